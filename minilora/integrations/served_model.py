"""What MLflow runs to make the model: it copies this file into it, instead of a pickle."""
from mlflow.models import set_model

from minilora.integrations.serving import NoteLabeller

set_model(NoteLabeller())
