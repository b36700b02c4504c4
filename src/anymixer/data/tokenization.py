"""Tokenizers by name or from local files, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from anymixer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ALTERNATIVES = "give a folder with tokenizer.json or vocab.txt, or a vocab.txt file"


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer.

    Args:
        name_or_path: a folder with `tokenizer.json`, `vocab.txt` (WordPiece, lower case) or `vocab.json` and
            `merges.txt` (GPT-2's byte-level BPE); one of the files `tokenizer.json` and `vocab.txt`; or a
            name on the Hugging Face Hub, taken from the local cache where it is there.

    Raises:
        UserError: nothing loadable is there; the message names the key `tokenizer_name`.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        tokenizer = _from_folder(path)
    elif path.is_file():
        tokenizer = _from_file(path)
    elif name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1 or path.suffix in (".txt", ".json"):
        raise UserError(f"tokenizer_name: no such file or folder: {name_or_path}")
    else:
        tokenizer = _from_hub(name_or_path)
    # Rows are cut by the loader; without this, transformers warns of every text longer than the model.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def wordpiece_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    """Return BERT's lower-case tokenizer with this vocabulary (entry -> id); its five own tokens are special.

    Built from its parts, because `BertTokenizerFast(vocab_file=...)` of transformers 5 ignores the file.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.WordPiece(prefix="##")  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return BertTokenizerFast(tokenizer_object=backend, do_lower_case=True)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256, in hex, of what turns text into ids: vocabulary, normalizer and pre-tokenizer."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    identity = {part: backend[part] for part in ("normalizer", "pre_tokenizer")}
    identity["vocabulary"] = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, GPT2TokenizerFast

    if (folder / "tokenizer_config.json").is_file():
        return _fast(_loaded(AutoTokenizer, folder), folder)
    for name in ("tokenizer.json", "vocab.txt"):
        if (folder / name).is_file():
            return _from_file(folder / name)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _fast(_loaded(GPT2TokenizerFast, folder), folder)
    raise UserError(f"tokenizer_name: no tokenizer.json, vocab.txt or vocab.json with merges.txt in {folder}")


def _from_file(path: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    if path.suffix == ".txt":
        words = path.read_text(encoding="utf-8").split("\n")
        absent = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token not in words]
        if absent:
            raise UserError(f"tokenizer_name: {path} is not a WordPiece vocabulary: it has no {', '.join(absent)}")
        # As BERT's own loader reads it: one entry a line, an empty last line is none.
        entries = words[:-1] if words[-1] == "" else words
        return wordpiece_tokenizer({word.rstrip("\r"): number for number, word in enumerate(entries)})
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot parse
        raise UserError(f"tokenizer_name: {path} is not a tokenizer file ({_one_line(error)})") from error
    vocabulary = tokenizer.get_vocab()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names["mask_token"] = "[MASK]"
    # tokenizer.json does not say which of its tokens is which; BERT's own names are taken where they exist.
    tokenizer.add_special_tokens({role: token for role, token in names.items() if token in vocabulary})
    return tokenizer


def _from_hub(name: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    with suppress(OSError, ValueError):
        return _fast(AutoTokenizer.from_pretrained(name, local_files_only=True), name)
    try:
        _check_hub_is_there()
        with _silenced("huggingface_hub"):
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = f"'{name}' is not a local folder and cannot be fetched from the Hugging Face Hub"
        raise UserError(f"tokenizer_name: {reason}; {_ALTERNATIVES}") from error
    return _fast(tokenizer, name)


def _check_hub_is_there() -> None:
    """Raise OSError at once where the Hub's name does not resolve: its client would try for a minute."""
    from urllib.request import getproxies

    from huggingface_hub.constants import ENDPOINT

    if not getproxies():
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Keep the warnings of a library off the screen; its error says enough."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _loaded(loader: Any, folder: Path) -> object:
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot parse
        raise UserError(f"tokenizer_name: cannot read the tokenizer in {folder} ({_one_line(error)})") from error


def _fast(tokenizer: object, name: object) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer_name: {name} has no fast (tokenizer.json) form; {_ALTERNATIVES}")
    return tokenizer


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
