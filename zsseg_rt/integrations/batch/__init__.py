"""Many photos at once: images and a table for each, and a journal to resume from."""

from zsseg_rt.integrations.batch.annotation_files import AnnotationFiles
from zsseg_rt.integrations.batch.journal import JOURNAL, Journal, PhotoResult
from zsseg_rt.integrations.batch.photo_run import lanes_for, segment_photos

__all__ = ["JOURNAL", "AnnotationFiles", "Journal", "PhotoResult", "lanes_for", "segment_photos"]
