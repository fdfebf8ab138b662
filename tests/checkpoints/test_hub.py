"""Models on the hub. Functions of its library are replaced by ones that read local files, or find no net."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from definitions import error
from goldens import golden
from huggingface_hub.errors import EntryNotFoundError
from small_tokenizers import tokenizer_of

from palm_pytorch import LaMDA, PaLM, from_pretrained
from palm_pytorch.checkpoints import hub
from palm_pytorch.checkpoints.convert import read_model
from palm_pytorch.checkpoints.hub import PUBLIC, PublicCheckpoint
from palm_pytorch.cli import main
from palm_pytorch.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
SHAPE: dict[str, Any] = {"num_tokens": 37, "dim": 24, "depth": 2, "heads": 3, "dim_head": 16, "ff_mult": 2}


class Hub:
    """Repositories as folders of `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, Any]] = []

    def hf_hub_download(self, repo_id: str, filename: str, **where: Any) -> str:
        self.asked.append((f"{repo_id}/{filename}", where.get("revision")))
        if not (self.root / repo_id / filename).exists():
            raise EntryNotFoundError(f"{repo_id} has no {filename}")
        return str(self.root / repo_id / filename)

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **where: Any) -> str:
        if not where.get("local_files_only"):
            self.asked.append((repo_id, where.get("revision")))
        return str(self.root / repo_id)

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        (self.root / repo_id).mkdir(parents=True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        for file in Path(folder_path).iterdir():
            (self.root / repo_id / file.name).write_bytes(file.read_bytes())
        return f"https://huggingface.co/{repo_id}/commit/main"


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    for name in ("create_repo", "upload_folder"):
        method = getattr(found, name)
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda api, _do=method, **options: _do(**options))
    return found


def test_push_and_pull(local: Hub) -> None:
    model = PaLM(**SHAPE).eval()
    assert (
        model.push_to_hub("someone/small", private=True) == "https://huggingface.co/someone/small/commit/main"
    )
    files = {file.name for file in (local.root / "someone" / "small").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors"}
    text = torch.randint(37, (2, 30))
    for loaded in (
        from_pretrained("someone/small", revision="v1"),
        PaLM.from_pretrained("someone/small", attention_backend="reference"),
    ):
        assert type(loaded) is PaLM and error(loaded(text), model(text)) <= 1e-5
    assert ("someone/small", "v1") in local.asked
    assert "attention_backend" in loaded.config and loaded.config["attention_backend"] == "reference"
    with pytest.raises(ValueError, match="expected a LaMDA, got a PaLM"):
        LaMDA.from_pretrained("someone/small")


def test_the_tokenizer_goes_along(local: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There, back, and into the commands: a model on the hub lost it, but for the public ones."""
    expected = load_tokenizer(tokenizer_of(37, tmp_path / "words.json"))
    PaLM(**SHAPE).push_to_hub("someone/small", tokenizer=expected)
    model, found = read_model("someone/small", dtype=torch.bfloat16)
    assert found is not None and found.fingerprint == expected.fingerprint
    assert model.token_emb.weight.dtype == torch.bfloat16
    assert local.asked == [("someone/small", None)]
    flags = ["--prompt", "7", "--max-new-tokens", "3", "--device", "cpu"]
    assert main(["generate", "--checkpoint", "someone/small", *flags]) == 0
    first, *others = capsys.readouterr().out.split()
    assert first.startswith("7") and others and all(0 <= int(word) < 37 for word in others)


def test_a_flipped_bit_on_the_way(local: Hub) -> None:
    PaLM(**SHAPE).push_to_hub("someone/small")
    path = local.root / "someone" / "small" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        from_pretrained("someone/small")


def test_a_folder_comes_first(local: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PaLM(**SHAPE).save_pretrained(tmp_path / "someone" / "small")
    monkeypatch.chdir(tmp_path)
    from_pretrained("someone/small")
    with pytest.raises(FileNotFoundError, match=r"expected a folder, or the id .*, got 'someone/smal'"):
        from_pretrained("someone/smal")
    assert local.asked == []


# ------------------------------------------------------------------------------------- public checkpoints


@pytest.fixture
def public(local: Hub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with every tensor that a public one has, but smaller ones, in the hub's cache."""
    older = golden("palm_rlhf_0_2_1")
    name = PUBLIC["conceptofmind/palm-410m"].file
    folder = local.root / "conceptofmind" / "palm-410m"
    folder.mkdir(parents=True)
    torch.save({**older.state, "to_logits.weight": older.state["token_emb.weight"]}, folder / name)
    blob = folder / hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / name).rename(blob)
    (folder / name).symlink_to(blob)
    small = PublicCheckpoint(name, "palm-410m", blob.stat().st_size)
    monkeypatch.setitem(PUBLIC, "conceptofmind/palm-410m", small)
    shape = {**older.config, "norm": "layernorm", "xpos": True, "xpos_scale_base": 512}
    monkeypatch.setattr(hub, "preset", {"palm-410m": shape}.__getitem__)
    return blob


def test_a_public_checkpoint(public: Path, local: Hub) -> None:
    older = golden("palm_rlhf_0_2_1")
    model = from_pretrained("conceptofmind/palm-410m")
    assert type(model) is PaLM and error(model(older.tokens), older.logits) <= 1e-5
    half = PaLM.from_pretrained("conceptofmind/palm-410m", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {name for name, _ in local.asked} >= {"conceptofmind/palm-410m/palm_410m_8k_v0.pt"}


def test_a_public_checkpoint_that_is_another_file(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected a LaMDA, got a PaLM"):
        LaMDA.from_pretrained("conceptofmind/palm-410m")
    content = bytearray(public.read_bytes())
    content[len(content) // 2] ^= 1
    public.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its SHA-256 is not the hub's"):
        from_pretrained("conceptofmind/palm-410m")
    public.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"expected the [\d,]+ bytes of the public file, got [\d,]+"):
        from_pretrained("conceptofmind/palm-410m")


def test_the_public_files_are_those_that_were_published() -> None:
    sizes = {name: (public.file, public.size) for name, public in PUBLIC.items()}
    assert sizes == {
        "conceptofmind/palm-150m": ("palm_150m_8k_v0.pt", 579_328_004),
        "conceptofmind/palm-410m": ("palm_410m_8k_v0.pt", 1_640_783_199),
        "conceptofmind/palm-1b": ("palm_1b_8k_v0.pt", 3_935_638_575),
        "conceptofmind/palm-2b": ("palm_2b_8k_v0.pt", None),
    }


# ---------------------------------------------------------------------------------------------- bad input


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("someone/small", "conceptofmind/palm-150m"):
        with pytest.raises(
            ConnectionError, match=f"'{name}' is no folder here, and the hub cannot be reached"
        ):
            from_pretrained(name)


def test_a_public_checkpoint_in_the_cache_needs_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A config was asked for first, which such a repository has not; the answer was that of no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit, public = "a" * 40, hub.PUBLIC["conceptofmind/palm-150m"]
    folder = tmp_path / "models--conceptofmind--palm-150m"
    for name in (f"snapshots/{commit}", "refs"):
        (folder / name).mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit / public.file).write_bytes(b"weights")
    with pytest.raises(ValueError, match=rf"{public.file}: expected the {public.size:,} bytes"):
        from_pretrained("conceptofmind/palm-150m")


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    says = (
        "'someone/small' is no file or folder here, and models on the hub need huggingface_hub: pip install"
    )
    with pytest.raises(ModuleNotFoundError, match=re.escape(says)):
        from_pretrained("someone/small")
    assert main(["generate", "--checkpoint", "someone/small", "--prompt", "a"]) == 2
    assert capsys.readouterr().err.startswith(f"palm: error: {says}")
    with pytest.raises(ModuleNotFoundError, match=r"^models on the hub need huggingface_hub"):
        PaLM(**SHAPE).push_to_hub("someone/small")


@pytest.fixture
def empty_hub() -> Iterator[str]:
    """The address of a server that answers as the hub does where there is no such model."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("X-Error-Message", "Repository not found")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_hub_id_that_does_not_exist(empty_hub: str, tmp_path: Path) -> None:
    """Through huggingface_hub itself, which reads the hub's address when it is imported."""
    code = "import sys; from palm_pytorch.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {
        **os.environ,
        "HF_ENDPOINT": empty_hub,
        "HF_HOME": str(tmp_path / "cache"),
        "NO_PROXY": "*",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", "someone/nothing", str(tmp_path / "model")],
        cwd=ROOT,
        env=environment | {"HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("palm: error: 'someone/nothing' is no folder here, and the hub has no such model")
    assert not (tmp_path / "model").exists()
