"""Videos, captions and encoded features: read, cut, cache and load, exactly resumable."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mm_data.__about__ import __version__ as __version__
from mm_data.geometry import Geometry, count_reasons

if TYPE_CHECKING:
    from mm_data.batch import Batch, BatchDataset, Pick, pad_texts
    from mm_data.cache import FeatureCache, ToDo
    from mm_data.captions import Captions
    from mm_data.clips import ClipBatch, ClipDataset, ClipShape, survey
    from mm_data.conversation_dataset import ConversationDataset, Pack
    from mm_data.datasets import Clip, Failure, VideoDataset
    from mm_data.decoding import decode
    from mm_data.features import FeatureDataset
    from mm_data.identity import files_below, identify_files
    from mm_data.images import area_size, is_picture, read_image, read_mask
    from mm_data.keys import content_key
    from mm_data.loader import Loader, Step, build_loader
    from mm_data.manifest import Control, Sample, list_files, read_manifest
    from mm_data.order import Order
    from mm_data.processing import Encoded, Flops, Processing, Size
    from mm_data.selection import Selection, check_samples, for_task, select
    from mm_data.sets import Portion, SampleSet, read_sets
    from mm_data.transforms import crop_to, pad_to
    from mm_data.video import VideoClip, VideoInfo, probe, read_video
    from mm_data.video_write import made_with, write_video

__all__ = [
    "Batch",
    "BatchDataset",
    "Captions",
    "Clip",
    "ClipBatch",
    "ClipDataset",
    "ClipShape",
    "Control",
    "ConversationDataset",
    "Encoded",
    "Failure",
    "FeatureCache",
    "FeatureDataset",
    "Flops",
    "Geometry",
    "Loader",
    "Order",
    "Pack",
    "Pick",
    "Portion",
    "Processing",
    "Sample",
    "SampleSet",
    "Selection",
    "Size",
    "Step",
    "ToDo",
    "VideoClip",
    "VideoDataset",
    "VideoInfo",
    "area_size",
    "build_loader",
    "check_samples",
    "content_key",
    "count_reasons",
    "crop_to",
    "decode",
    "files_below",
    "for_task",
    "identify_files",
    "is_picture",
    "list_files",
    "made_with",
    "pad_texts",
    "pad_to",
    "probe",
    "read_image",
    "read_manifest",
    "read_mask",
    "read_sets",
    "read_video",
    "select",
    "survey",
    "write_video",
]

# What needs torch is imported when it is asked for: a command line that holds a Geometry is read without it.
_HOMES = {
    "batch": ("Batch", "BatchDataset", "Pick", "pad_texts"),
    "cache": ("FeatureCache", "ToDo"),
    "captions": ("Captions",),
    "clips": ("ClipBatch", "ClipDataset", "ClipShape", "survey"),
    "conversation_dataset": ("ConversationDataset", "Pack"),
    "datasets": ("Clip", "Failure", "VideoDataset"),
    "decoding": ("decode",),
    "features": ("FeatureDataset",),
    "identity": ("files_below", "identify_files"),
    "images": ("area_size", "is_picture", "read_image", "read_mask"),
    "keys": ("content_key",),
    "loader": ("Loader", "Step", "build_loader"),
    "manifest": ("Control", "Sample", "list_files", "read_manifest"),
    "order": ("Order",),
    "processing": ("Encoded", "Flops", "Processing", "Size"),
    "selection": ("Selection", "check_samples", "for_task", "select"),
    "sets": ("Portion", "SampleSet", "read_sets"),
    "transforms": ("crop_to", "pad_to"),
    "video": ("VideoClip", "VideoInfo", "probe", "read_video"),
    "video_write": ("made_with", "write_video"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"mm_data.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
