"""Loads exported folders with torch and transformers alone, as their users will: run as a file.

    python -IB fresh_process.py REQUEST.json ANSWER.safetensors

REQUEST: {"blocked": [packages that must not be imported], "folders": [{"folder", "auto_class", "rows", "texts"}]}.
ANSWER: what the models give for each folder's rows of token ids ("0.0", "0.1", ... for the first), and, as metadata,
the ids of its texts, whatever transformers did not find where it should be, and the error where it failed.
"""

import errno
import json
import sys
from importlib.abc import MetaPathFinder


class Blocker(MetaPathFinder):
    """In the place of all finders, makes packages look as if they were not installed."""

    def __init__(self, packages: list[str]) -> None:
        self.packages = set(packages)
        self.finders = list(sys.meta_path)
        sys.meta_path[:] = [self]

    def find_spec(self, fullname, path=None, target=None):
        """What the finders find, unless it is of a blocked package."""
        if fullname.partition(".")[0] in self.packages:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *arguments):
        """Installed packages' descriptions, which importlib.metadata asks for."""
        finders = [finder for finder in self.finders if hasattr(finder, "find_distributions")]
        return [found for finder in finders for found in finder.find_distributions(*arguments)]  # type: ignore[attr-defined]


def load(folder: str, auto_class: str):
    """The model, in float32 and evaluation mode, and the names of weights that were missing or too many."""
    import torch
    import transformers

    model, found = getattr(transformers, auto_class).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, torch_dtype=torch.float32
    )
    wrong = {key: sorted(map(str, names)) for key, names in found.items() if names}
    return model.eval(), wrong


def outputs(model, rows: list[list[int]]) -> list:
    """Logits, or whatever tensors come first, for rows of token ids that are padded to the longest."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        result = model(input_ids=ids, attention_mask=mask)
    kept = [value.contiguous() for value in result.to_tuple() if isinstance(value, torch.Tensor)]
    # What a model gives at padding means nothing.
    return [value[mask.bool()] if value.shape[:2] == mask.shape else value for value in kept]


def disk_is_full(error: BaseException | None) -> bool:
    """Whether the disk of this process's own files is, to which transformers copies the code: no fault of a folder."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__context__
    return False


def main(request_file: str, answer_file: str) -> None:
    """Answer a request."""
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    Blocker(request["blocked"])
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    tensors, notes = {}, {}
    for number, asked in enumerate(request["folders"]):
        note = {"wrong": {}, "ids": [], "error": None}
        try:
            model, note["wrong"] = load(asked["folder"], asked["auto_class"])
            for place, value in enumerate(outputs(model, asked["rows"])):
                tensors[f"{number}.{place}"] = value
            if asked["texts"]:
                tokenizer = AutoTokenizer.from_pretrained(asked["folder"], trust_remote_code=True)
                note["ids"] = tokenizer(asked["texts"])["input_ids"]
        except Exception as error:
            if disk_is_full(error):
                raise
            # Whatever else it is, the user of the folder would meet it too.
            note["error"] = f"{type(error).__name__}: {error}"
        notes[str(number)] = json.dumps(note)
    save_file(tensors, answer_file, metadata=notes)


if __name__ == "__main__":
    main(*sys.argv[1:])
