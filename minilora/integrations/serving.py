"""A run as an MLflow model: what a registry keeps, and what a fresh process, a server or a Spark job loads.

The model carries the adapter, the tokenizer, the label set and the prompt, and names its base: a registry is no place for 4
gigabytes that the hub has.  Loading it elsewhere, the base can be named anew:

    mlflow.pyfunc.load_model("models:/protocols@champion", model_config={"model": "/models/meditron-7b"})

    in     note (string)
    out    prediction, probability, error, runner_up, runner_up_probability: the columns that `predict` adds to a table

minilora has to be installed where it is loaded; no code is in the model but `served_model.py`, which names this class.

Lesson 19 explains it.
"""
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, Schema

from minilora.adapters import EXTRA_FILE
from minilora.audit_log import model_digest
from minilora.config import read_toml
from minilora.errors import ConfigError
from minilora.integrations.tracking import Store, or_one_line, read_state, track
from minilora.own_base import FOLDER as OWN_BASE
from minilora.predict import ADDED_COLUMNS, ADDED_NUMBERS, Predictor
from minilora.runs import CONFIG_FILE

CODE = Path(__file__).with_name("served_model.py")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# By name, as a run folder may also hold evaluations, and those the notes.
SERVED = (*ADAPTER_FILES, EXTRA_FILE, "labels.txt", "README.md", CONFIG_FILE, OWN_BASE, "tokenizer.json", "tokenizer.model",
          "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")
DIGEST_TAG = "files_sha256"
FULLY_TUNED = ("config.json", "model.safetensors", "model.safetensors.index.json")
EXAMPLE = "History: fall from a ladder. Diagnosis: concern for fracture of the wrist."        # of nobody
SIGNATURE = ModelSignature(
    Schema([ColSpec("string", "note")]),
    Schema([ColSpec("double" if name in ADDED_NUMBERS else "string", name, required=name == "prediction")
            for name in ADDED_COLUMNS]))


class NoteLabeller(mlflow.pyfunc.PythonModel):
    """Labels notes, by the run it was made from."""

    def load_context(self, context: Any) -> None:
        """Load base and adapter.

        Args: context: its ``model_config`` names the base (model), the device and the compute type.
        Raises: MiniloraError: see `Predictor.load`.
        """
        settings = context.model_config or {}
        run = Path(context.artifacts["run"])
        adapter = run if (run / ADAPTER_FILES[0]).is_file() else None
        base = settings["model"] if adapter else str(run)
        self.predictor = Predictor.load(base, adapter, device=settings.get("device", "auto"),
                                        dtype=settings.get("dtype", "auto"), quiet=True)

    def predict(self, context: Any, model_input: pd.DataFrame, params: "dict[str, Any] | None" = None) -> pd.DataFrame:
        """(n,) notes -> (n,) rows of `ADDED_COLUMNS`; an empty note, or none, has an error and no prediction."""
        # Trap: what is missing in a column of text is None in one version of pandas, NaN or NA in another.
        notes = ["" if pd.isna(note) else str(note) for note in model_input["note"].tolist()]
        answers = [answer.cells for answer in self.predictor.predict(notes)]
        return pd.DataFrame(answers, model_input.index, list(ADDED_COLUMNS)).astype(dict.fromkeys(ADDED_NUMBERS, "float64"))


@contextmanager
def _staged(run: Path) -> Iterator[Path]:
    """The files of a run that are served, in a folder of their own."""
    with TemporaryDirectory() as folder:
        staged = Path(folder) / "run"
        staged.mkdir()
        for path in sorted(run.iterdir()):
            wanted = path.name in (*SERVED, *FULLY_TUNED) or path.match("model-*-of-*.safetensors")
            if wanted and path.is_dir():
                shutil.copytree(path, staged / path.name)
            elif wanted:
                shutil.copy(path, staged / path.name)
        yield staged


@contextmanager
def _pointed_at(store: Store) -> Iterator[None]:
    """MLflow's functions that take no client look at global settings, which it also puts into the environment: both go back."""
    before = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    mlflow.set_tracking_uri(store.tracking)
    mlflow.set_registry_uri(store.registry or store.tracking)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@dataclass(frozen=True)
class Fetched:
    """A registered model on this machine.

    Attributes: name, version: in the registry. model, adapter: as in `Predictor.load`.
    """

    name: str
    version: str
    model: str
    adapter: str | None


@contextmanager
def fetched(reference: str, store: Store) -> Iterator[Fetched]:
    """Fetch a registered model, for the length of the block.

    Args: reference: models:/NAME@ALIAS or models:/NAME/VERSION.
    Raises: ConfigError: no such model, or none that `register` made. OutputError: the store cannot be reached.
    """
    named = REFERENCE.fullmatch(reference)
    if named is None:
        raise ConfigError(f"{reference}: a registered model is named models:/NAME@ALIAS or models:/NAME/VERSION")
    client, name = store.client(), named["name"]
    with TemporaryDirectory() as folder:
        with or_one_line(store), _pointed_at(store):
            try:
                found = (client.get_model_version_by_alias(name, named["alias"]) if named["alias"]
                         else client.get_model_version(name, named["version"]))
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                raise ConfigError(f"the registry has no {reference}; `minilora track RUN --mlflow --register NAME` puts one "
                                  "there") from None
            version = str(found.version)
            local = Path(mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}/{version}", dst_path=folder))
            base = (Model.load(str(local)).metadata or {}).get("base_model")
        run = local / "artifacts" / "run"
        if not isinstance(base, str) or not run.is_dir():
            raise ConfigError(f"{reference} was not registered by minilora")
        adapted = (run / ADAPTER_FILES[0]).is_file()
        yield Fetched(name, version, base if adapted else str(run), str(run) if adapted else None)


def register(out: "str | Path", store: Store, name: str, alias: "str | None" = None) -> int:
    """Keep a finished run's model in the registry, as the next version of a name.

    Args:
        name: of the model; in Unity Catalog catalog.schema.model. alias: given to this version, taken from another.

    Returns: the version.
    Raises: ConfigError: the run is not finished. OutputError: the store takes nothing.
    """
    out = Path(out)
    if not (out / ADAPTER_FILES[1]).is_file() and not (out / FULLY_TUNED[0]).is_file():
        raise ConfigError(f"{out} holds no finished run: nothing to register")
    run_id = read_state(out).get("run_id") or track(out, store)
    base = str(read_toml(out / CONFIG_FILE)["model"])
    if os.path.isdir(base):
        base = os.path.abspath(base)
    with or_one_line(store), _pointed_at(store), _staged(out) as staged, mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name="model", python_model=str(CODE), artifacts={"run": str(staged)}, model_config={"model": base},
            signature=SIGNATURE, input_example=pd.DataFrame({"note": [EXAMPLE]}), pip_requirements=["minilora", "pandas"],
            metadata={"base_model": base}, registered_model_name=name)
        version = int(logged.registered_model_version)
        # What the audit log of `predict` says of the run folder, so that a line there leads to a version here.
        store.client().set_model_version_tag(name, str(version), DIGEST_TAG, model_digest(staged))
        if alias:
            store.client().set_registered_model_alias(name, alias, str(version))
    return version
