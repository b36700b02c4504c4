import pytest

from anymixer.data import load_tokenizer, tokenizer_fingerprint
from anymixer.errors import UserError

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "."]


@pytest.fixture
def vocab_folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return tmp_path


def test_vocab_txt_by_folder_and_by_file(vocab_folder):
    for name in (vocab_folder, vocab_folder / "vocab.txt"):
        tokenizer = load_tokenizer(str(name))
        assert tokenizer("The CATS sat.")["input_ids"] == [2, 5, 6, 7, 8, 9, 3]
        assert len(tokenizer) == len(VOCABULARY)


def test_fingerprint_survives_saving_and_sees_changes(vocab_folder, tmp_path):
    tokenizer = load_tokenizer(str(vocab_folder))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("the cat", truncation=True, max_length=3)  # leaves its mark in the backend
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "saved"))) == before
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "saved" / "tokenizer.json"))) == before
    (vocab_folder / "vocab.txt").write_text("\n".join(reversed(VOCABULARY)))
    assert tokenizer_fingerprint(load_tokenizer(str(vocab_folder / "vocab.txt"))) != before


def test_tokenizer_json_alone_knows_its_special_tokens(vocab_folder, tmp_path):
    load_tokenizer(str(vocab_folder)).save_pretrained(tmp_path / "saved")
    tokenizer = load_tokenizer(str(tmp_path / "saved" / "tokenizer.json"))
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id) == (4, 0)


def test_trained_tokenizer_has_berts_ids(tokenizer):
    assert tokenizer.all_special_ids and tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == VOCABULARY[:5]
    assert tokenizer.decode(tokenizer("The small Dogs")["input_ids"]) == "[CLS] the small dogs [SEP]"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no tokenizer.json"),
        (lambda folder: (folder / "vocab.txt").write_text("a\nb\n"), "not a WordPiece vocabulary"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not a tokenizer file"),
    ],
)
def test_unusable_folders_are_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_path_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(UserError, match="tokenizer_name: no such file or folder"):
        load_tokenizer(str(tmp_path / "absent"))


def test_unfetchable_name_lists_the_local_alternatives(monkeypatch):
    import transformers

    def fail(name, **options):
        raise OSError("offline")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UserError, match=r"tokenizer_name: 'bert-base-uncased' .*vocab\.txt"):
        load_tokenizer("bert-base-uncased")
