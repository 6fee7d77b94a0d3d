#include <math.h>
#include <stdint.h>
#include <string.h>

/* bfloat16 is the upper half of a float; rounding is to the nearest, ties to even, as torch does. */
static inline float from_bf16(uint16_t v) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }
static inline uint16_t to_bf16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : (uint16_t)rounded;
}
#define AS_IS(v) (v)
#define SIMD(clauses) _Pragma(#clauses)

#define DEFINE(NAME, T, LOAD, STORE)                                                                              \
static float mean_##NAME(const T *restrict x, int64_t H) {                                                        \
  float mean = 0;                                                                                                 \
  SIMD(omp simd reduction(+:mean))                                                                                \
  for (int64_t j = 0; j < H; j++) mean += LOAD(x[j]);                                                             \
  return mean / H;                                                                                                \
}                                                                                                                 \
void forward_##NAME(const T *restrict X, T *restrict Z, float *restrict RSTD, float *restrict MEAN,               \
                    int64_t rows, int64_t H, float eps, float C, float k, int centered, int threads) {            \
  SIMD(omp parallel for num_threads(threads) if(threads > 1))                                                     \
  for (int64_t i = 0; i < rows; i++) {                                                                            \
    const T *restrict x = X + i * H; T *restrict z = Z + i * H;                                                   \
    float mean = centered ? mean_##NAME(x, H) : 0, var = 0;                                                       \
    if (i + 1 < rows) /* the next row comes in while this one is computed */                                      \
      for (int64_t j = 0; j < H; j += 64 / sizeof(T)) __builtin_prefetch(x + H + j);                              \
    SIMD(omp simd reduction(+:var))                                                                               \
    for (int64_t j = 0; j < H; j++) { float d = LOAD(x[j]) - mean; var += d * d; }                                \
    for (int64_t j = 0; j < H; j += 64 / sizeof(T)) __builtin_prefetch(z + j, 1); /* its lines, to be written */  \
    float rstd = 1.0f / sqrtf(var / H + eps);                                                                     \
    if (MEAN) MEAN[i] = mean;                                                                                     \
    if (RSTD) RSTD[i] = rstd;                                                                                     \
    SIMD(omp simd)                                                                                                \
    for (int64_t j = 0; j < H; j++) { float y = (LOAD(x[j]) - mean) * rstd; z[j] = STORE((C - C * k * y) * y); }  \
  }                                                                                                               \
}                                                                                                                 \
/* dy = phi(y) * dz with phi constant; dx = rstd * (dy - mean(dy) - y * mean(dy * y)). The second term comes      \
   from the mean and the third from the standard deviation: a factor of 0 makes that one a constant. Without X    \
   phi is 1 and the standard deviation is a constant. */                                                          \
void backward_##NAME(const T *restrict X, const T *restrict DZ, T *restrict DX, const float *restrict RSTD,       \
                     const float *restrict MEAN, int64_t rows, int64_t H, float C, float k, int centered,         \
                     float through_mean, float through_std, int threads) {                                        \
  SIMD(omp parallel for num_threads(threads) if(threads > 1))                                                     \
  for (int64_t i = 0; i < rows; i++) {                                                                            \
    const T *restrict dz = DZ + i * H; T *restrict dx = DX + i * H;                                               \
    float rstd = RSTD[i];                                                                                         \
    if (!X) {                                                                                                     \
      float mean_dy = through_mean ? mean_##NAME(dz, H) : 0;                                                      \
      SIMD(omp simd)                                                                                              \
      for (int64_t j = 0; j < H; j++) dx[j] = STORE(rstd * (LOAD(dz[j]) - mean_dy));                              \
      continue;                                                                                                   \
    }                                                                                                             \
    const T *restrict x = X + i * H;                                                                              \
    float mean = !centered ? 0 : MEAN ? MEAN[i] : mean_##NAME(x, H), mean_dy = 0, mean_dyy = 0;                   \
    SIMD(omp simd reduction(+:mean_dy, mean_dyy))                                                                 \
    for (int64_t j = 0; j < H; j++) {                                                                             \
      float y = (LOAD(x[j]) - mean) * rstd, dy = (C - C * k * y) * LOAD(dz[j]);                                   \
      mean_dy += dy; mean_dyy += dy * y;                                                                          \
    }                                                                                                             \
    for (int64_t j = 0; j < H; j += 64 / sizeof(T)) __builtin_prefetch(dx + j, 1);                                \
    mean_dy *= through_mean / H; mean_dyy *= through_std / H;                                                     \
    SIMD(omp simd)                                                                                                \
    for (int64_t j = 0; j < H; j++) {                                                                             \
      float y = (LOAD(x[j]) - mean) * rstd, dy = (C - C * k * y) * LOAD(dz[j]);                                   \
      dx[j] = STORE(rstd * (dy - mean_dy - y * mean_dyy));                                                        \
    }                                                                                                             \
  }                                                                                                               \
}
DEFINE(float32, float, AS_IS, AS_IS)
DEFINE(bfloat16, uint16_t, from_bf16, to_bf16)
