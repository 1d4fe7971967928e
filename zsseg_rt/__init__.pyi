# The public names and their types, for readers and type checkers: __init__.py imports each when it
# is first used.
from zsseg_rt.bundles.bundle import Bundle as Bundle
from zsseg_rt.common.recordings import Rotation as Rotation
from zsseg_rt.config import EngineConfig as EngineConfig
from zsseg_rt.engine import Engine as Engine
from zsseg_rt.errors import ArgumentError as ArgumentError
from zsseg_rt.errors import BackendError as BackendError
from zsseg_rt.errors import BackendUnavailableError as BackendUnavailableError
from zsseg_rt.errors import BundleError as BundleError
from zsseg_rt.errors import BundleVersionError as BundleVersionError
from zsseg_rt.errors import CaptureError as CaptureError
from zsseg_rt.errors import CheckpointError as CheckpointError
from zsseg_rt.errors import ConfigError as ConfigError
from zsseg_rt.errors import CudaError as CudaError
from zsseg_rt.errors import DatasetError as DatasetError
from zsseg_rt.errors import DeviceError as DeviceError
from zsseg_rt.errors import DTypeError as DTypeError
from zsseg_rt.errors import EndOfSource as EndOfSource
from zsseg_rt.errors import EngineStateError as EngineStateError
from zsseg_rt.errors import FetchError as FetchError
from zsseg_rt.errors import FrameError as FrameError
from zsseg_rt.errors import PrecisionNotApplied as PrecisionNotApplied
from zsseg_rt.errors import ShapeError as ShapeError
from zsseg_rt.errors import SourceError as SourceError
from zsseg_rt.errors import TrainingError as TrainingError
from zsseg_rt.errors import VocabularyError as VocabularyError
from zsseg_rt.errors import ZssegError as ZssegError
from zsseg_rt.photos import read_photo as read_photo
from zsseg_rt.results.annotations import Component as Component
from zsseg_rt.results.annotations import Polygon as Polygon
from zsseg_rt.results.segmentation import ClassShare as ClassShare
from zsseg_rt.results.segmentation import DeviceSegmentation as DeviceSegmentation
from zsseg_rt.results.segmentation import Frame as Frame
from zsseg_rt.results.segmentation import Segmentation as Segmentation
from zsseg_rt.runtime.frame_memory import FrameMemory as FrameMemory
from zsseg_rt.runtime.frames import Nv12Frame as Nv12Frame
from zsseg_rt.runtime.lane import Lane as Lane
from zsseg_rt.stream.runner import Stream as Stream
from zsseg_rt.text.vocabulary import Vocabulary as Vocabulary

__version__: str
