"""Models with experts are trained by Transformers, saved, loaded again and pushed to a hub, and keep their experts."""

import base64
import errno
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ssd_lit
from ssd_lit.config import MoEConfig
from ssd_lit.huggingface.moefy import moefy_folder
from tests.checkpoint_folders import MODELS, outputs, save_model
from tests.huggingface.test_moefy import add_tokenizer

E, K = 8, 3


def opened(folder: Path, name: str = "gpt2", router: Any = "center") -> Any:
    """A model in sparse mode, of a folder with a tokenizer."""
    save_model(folder / "dense", name, dtype=torch.float32)
    add_tokenizer(folder / "dense")
    moefy_folder(folder / "dense", folder / "experts", MoEConfig(experts=E, top_k=K, router=router))
    return ssd_lit.load(folder / "experts", mode="sparse")


def outputs_in_both_modes(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    model.eval()
    found = []
    for mode in ("dense", "sparse"):
        ssd_lit.set_mode(model, mode)  # type: ignore[arg-type]
        found.append(outputs(model, tokens))
    assert not torch.allclose(*found)
    return found


def same(folder: Path, expected: list[torch.Tensor], tokens: torch.Tensor, name: str = "gpt2") -> None:
    """Whether the folder opens in both modes with those outputs, and in Transformers with the dense ones."""
    for found, one in zip(outputs_in_both_modes(ssd_lit.load(folder), tokens), expected, strict=True):
        torch.testing.assert_close(found, one)
    plain = getattr(transformers, MODELS[name][2]).from_pretrained(folder).eval()
    torch.testing.assert_close(outputs(plain, tokens), expected[0])


def test_round_and_round_nothing_is_lost(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = opened(tmp_path)
    expected = outputs_in_both_modes(model, tokens)
    for number in range(3):
        model.save_pretrained(tmp_path / f"again-{number}")
        same(tmp_path / f"again-{number}", expected, tokens)
        tokenizers = [tmp_path / folder / "tokenizer.json" for folder in ("experts", f"again-{number}")]
        assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()
        model = ssd_lit.load(tmp_path / f"again-{number}", mode="sparse")
    model.save_pretrained(tmp_path / "again-2")  # into the folder that it came from
    same(tmp_path / "again-2", expected, tokens)


def test_the_card_stays_while_the_weights_do(tmp_path: Path) -> None:
    model = opened(tmp_path)
    card = (tmp_path / "experts/README.md").read_text()
    assert "8 experts in each FFN, of which a token uses 3" in card
    assert "`dense`" in card
    model.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same/README.md").read_text() == card
    model.lm_head.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "other")
    assert "None were measured with these weights" in (tmp_path / "other/README.md").read_text()
    assert "`dense`" not in (tmp_path / "other/README.md").read_text()


def trainer(model: Any, folder: Path, steps: int, **how: Any) -> Any:
    pytest.importorskip("accelerate", reason="Transformers' Trainer needs accelerate: pip install accelerate")
    texts = torch.randint(50, (16, 9), generator=torch.Generator().manual_seed(2)).tolist()
    data = [{"input_ids": text, "labels": text} for text in texts]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=4, eval_steps=4, learning_rate=0.05,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, **how,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize("name", ["gpt2", "llama biased"])
def test_fine_tuning_by_transformers_keeps_the_experts(tmp_path: Path, tokens: torch.Tensor, name: str) -> None:
    """In sparse mode, through its checkpoints: gone on from, and the best of them taken in the end."""
    model = opened(tmp_path, name)
    before = outputs_in_both_modes(model, tokens)
    tuned = trainer(model, tmp_path / "run", 8)
    tuned.train()
    expected = outputs_in_both_modes(model, tokens)
    assert not torch.allclose(expected[0], before[0])
    tuned.save_model(str(tmp_path / "tuned"))
    for folder in ("tuned", "run/checkpoint-8"):
        same(tmp_path / folder, expected, tokens, name)

    half = trainer(ssd_lit.load(tmp_path / "experts", mode="sparse"), tmp_path / "run", 8)
    half.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    for found, one in zip(outputs_in_both_modes(half.model, tokens), expected, strict=True):
        torch.testing.assert_close(found, one)

    best = trainer(
        ssd_lit.load(tmp_path / "experts", mode="sparse"), tmp_path / "best", 8, load_best_model_at_end=True,
        eval_strategy="steps", metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    best.train()
    chosen = best.state.best_model_checkpoint
    assert chosen.endswith("checkpoint-4")  # the worst, which is asked for here: the last one is still in memory
    same(Path(chosen), outputs_in_both_modes(best.model, tokens), tokens, name)


def test_a_gate_is_not_lost_silently(tmp_path: Path) -> None:
    model = opened(tmp_path, router="gate")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "experts").state_dict()
    with pytest.raises(RuntimeError, match="a dense checkpoint lacks the gate; open its folder"):
        model.load_state_dict(dense, strict=False)


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as an upload needs; it keeps the files of commits."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/someone/model", "name": "someone/model"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/someone/model/commit/1",
                    "commitOid": "1",
                    "success": True,
                }
            )
        else:
            self.answer({}, 200 if self.path == "/api/validate-yaml" else 404)

    def do_GET(self) -> None:
        found = self.path == "/api/whoami-v2"
        self.answer({"name": "someone", "type": "user"} if found else {}, 200 if found else 404)

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files that a hub on this machine has been sent."""
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub.files
    server.shutdown()
    server.server_close()


def test_what_is_pushed_opens_in_both_modes(tmp_path: Path, tokens: torch.Tensor, hub: dict[str, bytes]) -> None:
    model = opened(tmp_path)
    expected = outputs_in_both_modes(model, tokens)
    assert model.push_to_hub("someone/model", token="hf_test", private=True).endswith("/commit/1")
    (tmp_path / "pulled").mkdir()
    for name, content in hub.items():
        (tmp_path / "pulled" / name).write_bytes(content)
    assert {"README.md", "experts.json", "experts.safetensors", "model.safetensors", "tokenizer.json"} <= hub.keys()
    same(tmp_path / "pulled", expected, tokens)
    assert hub["README.md"] == (tmp_path / "experts/README.md").read_bytes()


@pytest.mark.parametrize("how", ["shards", "state", "full disk"])
def test_a_folder_outlives_a_save_that_fails(
    tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    model = opened(tmp_path)
    expected = outputs_in_both_modes(model, tokens)
    before = {path.name: path.read_bytes() for path in (tmp_path / "experts").iterdir()}
    model.lm_head.weight.data.mul_(2)
    options: dict[str, Any] = {"shards": {"max_shard_size": "5 gigs"}, "state": {"state_dict": {}}}.get(how, {})
    if how == "full disk":

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("ssd_lit.huggingface.experts.save_file", full)
    with pytest.raises((ValueError, KeyError, OSError)):
        model.save_pretrained(tmp_path / "experts", **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "experts").iterdir()} == before
    same(tmp_path / "experts", expected, tokens)


def test_shards_of_an_earlier_save_do_not_stay(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = opened(tmp_path)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    same(tmp_path / "again", outputs_in_both_modes(model, tokens), tokens)
    model.lm_head.weight.data.mul_(2)
    expected = outputs_in_both_modes(model, tokens)
    for size in ("1MB", "20KB"):
        model.save_pretrained(tmp_path / "again", max_shard_size=size)
        same(tmp_path / "again", expected, tokens)
    names = {path.name for path in (tmp_path / "again").glob("*.safetensors")}
    index = json.loads((tmp_path / "again/model.safetensors.index.json").read_text())
    assert names == {*index["weight_map"].values(), "experts.safetensors"}
