"""The model card of a run's best model, and its push to the Hub.

The card of `best/` gets the scores on the test split (or, without one, on validation), the data set and the command.
`--push_to_hub` uploads the folder with it. The repository is created or found before training starts, so that a
missing token is noticed then. A push that fails at the end leaves the results; the same command tries it again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from common.options import OptionError
from hf_adanorm import write_model_card
from hf_adanorm.saving import CARD_NAME, read_card, write_file

_IS_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def prepare_push(options: Any) -> None:
    """Find or make the repository. Raises OptionError when the options or the Hub do not allow a push."""
    if not options.push_to_hub:
        return
    if options.hub_model_id is None:
        raise OptionError("--push_to_hub true needs --hub_model_id, the repository's name such as me/my-model")
    try:
        HfApi().create_repo(options.hub_model_id, private=options.hub_private or None, exist_ok=True)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise OptionError(f"cannot push to {options.hub_model_id}: {' '.join(str(error).split())}") from None


def publish(folder: Path, results: dict[str, Any], options: Any) -> None:
    """Write the card of the model in `folder`, and push the folder if `options` say so."""
    # Somebody may have edited the repository's card: keep it, and update our section in it.
    if options.push_to_hub and HfApi().file_exists(options.hub_model_id, CARD_NAME):
        write_file(folder / CARD_NAME, read_card(Path(hf_hub_download(options.hub_model_id, CARD_NAME))) or "")
    split = "test" if results.get("test") else "validation"
    local = options.train_file is not None or options.dataset_name is None
    is_id = not local and _IS_ID.fullmatch(options.dataset_name) and not Path(options.dataset_name).exists()
    base = getattr(options, "model_name_or_path", None)
    known = base and base != options.hub_model_id and _IS_ID.fullmatch(base) and not Path(base).exists()
    write_model_card(
        folder,
        model_id=options.hub_model_id,
        base_model=base if known else None,
        datasets=[options.dataset_name] if is_id else None,
        dataset_name=None if is_id else "local files",
        dataset_split=split,
        results={name: value for name, value in results[split].items() if isinstance(value, (int, float))},
        task=results.get("pipeline"),
        command=results["command"],
    )
    if options.push_to_hub:
        message = f"Best model: {options.norm}, step {results['best_step']}"
        HfApi().upload_folder(repo_id=options.hub_model_id, folder_path=folder, commit_message=message)
        print(f"pushed to {options.hub_model_id}", flush=True)
