"""What all recipes share: options, set-up, the loop's parts, checkpoints, evaluation, results, publishing."""
