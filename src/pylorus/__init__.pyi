from .api import Model as Model
from .api import TrainedRun as TrainedRun
from .api import Validation as Validation
from .api import audit as audit
from .api import load_model as load_model
from .api import train as train
from .api import validate as validate
from .core.errors import PylorusError as PylorusError
from .data.datamodule import ImageDataModule as ImageDataModule
from .model.averaging import AverageWeights as AverageWeights
from .model.classifier import Classifier as Classifier
from .model.finetuning import FreezeBackbone as FreezeBackbone
from .report import report as report

__version__: str
