"""Videos, captions and encoded features: read, cut, cache and load, exactly resumable."""

from mm_data.__about__ import __version__ as __version__
from mm_data.cache import FeatureCache as FeatureCache
from mm_data.cache import Plan as Plan
from mm_data.cache import content_key as content_key
from mm_data.datasets import Clip as Clip
from mm_data.datasets import Failure as Failure
from mm_data.datasets import VideoDataset as VideoDataset
from mm_data.features import FeatureDataset as FeatureDataset
from mm_data.geometry import Geometry as Geometry
from mm_data.images import read_image as read_image
from mm_data.loader import Batch as Batch
from mm_data.loader import Step as Step
from mm_data.loader import build_loader as build_loader
from mm_data.manifest import Control as Control
from mm_data.manifest import Sample as Sample
from mm_data.manifest import read_manifest as read_manifest
from mm_data.selection import Selection as Selection
from mm_data.selection import select as select
from mm_data.video import VideoClip as VideoClip
from mm_data.video import VideoInfo as VideoInfo
from mm_data.video import probe as probe
from mm_data.video import read_video as read_video
from mm_data.video_write import made_with as made_with
from mm_data.video_write import write_video as write_video
