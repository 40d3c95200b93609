"""The audit: every claim holds, each can fail, and a failure is told and ends with an error."""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from minilora import NF4_CODE, LoRAConfig, audit, quantize_nf4
from minilora.audit import Claim, _exact, _most, _near
from minilora.cli import main


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return list(audit.audit())


def test_every_claim_holds(claims: list[Claim]) -> None:
    assert [claim for claim in claims if not claim.ok] == []
    assert len(claims) >= 40 and len({claim.claim for claim in claims}) == len(claims)
    assert all(claim.source and claim.expected and claim.measured for claim in claims)


@pytest.mark.parametrize("about", ["quantiles", "bits a weight", "GB saved", "10,000 x 20,000", "Llama 65B", "FP4", "INT4",
                                   "finite differences", "AdamW", "merging into 16 bits", "merging into 4 bits",
                                   "micro-batches", "begin tokens", "end there"])
def test_the_audit_covers_what_it_must(claims: list[Claim], about: str) -> None:
    assert any(about in claim.claim for claim in claims)


def test_a_claim_can_fail() -> None:
    assert not _near("x", "y", 1.0, 1.2, 0.1).ok and _near("x", "y", 1.0, 1.05, 0.1).ok
    assert not _near("x", "y", 1.0, float("nan"), 0.1).ok
    assert not _most("x", "y", 1.0, 1.01).ok and not _most("x", "y", 1.0, float("nan")).ok and _most("x", "y", 1.0, 1.0).ok
    assert not _exact("x", "y", 3, 4).ok and _exact("x", "y", 3, 3).ok


@pytest.mark.parametrize(("name", "wrong", "check"), [
    ("NF4_CODE", torch.linspace(-1, 1, 16), audit.codebook),
    ("derive_nf4", lambda: NF4_CODE.numpy() * 1.001, audit.codebook),
    ("quantize_nf4", lambda w, blocksize=64, double_quant=True: quantize_nf4(w, 32, double_quant), audit.storage),
    ("LoRAConfig", partial(LoRAConfig, target_modules=("q_proj", "v_proj")), audit.low_rank),
    ("label_loss", lambda model, batch: model.hidden(batch.input_ids).sum() * batch.label_tokens, audit.loss)])
def test_a_wrong_part_turns_its_claims_red(monkeypatch: pytest.MonkeyPatch, name: str, wrong: object, check: object) -> None:
    monkeypatch.setattr(audit, name, wrong)
    assert not all(claim.ok for claim in check()), name        # type: ignore[operator]


def test_the_command_prints_and_writes_claims(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    good = Claim("two and two", "arithmetic", "4", "4", True)

    def checks() -> Iterator[Claim]:
        yield good

    monkeypatch.setattr(audit, "CHECKS", (checks,))
    assert main(["audit", "--json", str(tmp_path / "a.json")]) == 0
    assert "ok   two and two" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text()) == [dataclasses.asdict(good)]
    bad = dataclasses.replace(good, measured="5", ok=False)
    monkeypatch.setattr(audit, "CHECKS", (checks, lambda: iter([bad])))
    assert main(["audit", "--json", str(tmp_path / "a.json")]) == 2
    refused = capsys.readouterr()
    assert "--overwrite" in refused.err and refused.out == ""
    assert json.loads((tmp_path / "a.json").read_text()) == [dataclasses.asdict(good)], "kept"
    assert main(["audit", "--json", str(tmp_path / "a.json"), "--overwrite"]) == 2
    printed = capsys.readouterr()
    assert "FAIL two and two" in printed.out and "1 of 2 claims do not hold" in printed.err
    assert json.loads((tmp_path / "a.json").read_text())[1]["ok"] is False
