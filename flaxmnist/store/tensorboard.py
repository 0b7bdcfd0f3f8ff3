"""TensorBoard event files of a run: scalars, images and hyper-parameters.

An event file is a sequence of records, to which a run only appends. A run that resumes from a checkpoint starts another
file, whose first event makes TensorBoard discard the events of later steps in earlier files.
"""

import io
import json
import math
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.core.pictures import MAX_TILES, class_fractions, sheet
from flaxmnist.store.records import Records

# tensorboardX imports PyTorch if it is installed, which takes a second and is not needed here.
sys.modules.setdefault("torch", None)  # pyright: ignore[reportArgumentType]
try:
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.record_writer import masked_crc32c
    from tensorboardX.summary import hparams
finally:
    if sys.modules["torch"] is None:
        del sys.modules["torch"]

# The metric in TensorBoard's table of hyper-parameters.
METRIC = "test/accuracy"

# Pixels: the approximate width of an image of weights; the maximum width of a confusion matrix, the side of its cells,
# and the margin for their labels.
MOSAIC, MATRIX, CELL, MARGIN = 480, 800, 40, 56

Picture = UInt8[np.ndarray, "height width 3"]


class EventWriter:
    """Writer of a run's event files: the scalars of ``metrics.jsonl``, and images."""

    def __init__(self, folder: Path, records: Records, step: int, config: Config):
        """Start or resume at ``step``; ``records`` hold everything to keep from before. Raise OSError."""
        self.folder, self.records, self.config = folder, records, config
        folder.mkdir(exist_ok=True)
        self.begin(step)

    def begin(self, step: int) -> None:
        """Prepare another file, for ``step`` and later steps, without writing it yet. Raise OSError."""
        old_paths = sorted(self.folder.glob("events.out.tfevents.*"))
        old_files = [read_events(path) for path in old_paths]
        # If an earlier file is damaged, repeat the events of all steps.
        start = step if old_files and all(intact for _, intact in old_files) else 0
        number = 1 + max((int(path.suffix[1:]) for path in old_paths if path.suffix[1:].isdecimal()), default=0)
        # TensorBoard reads the files in alphabetical order.
        self.path, self.size = self.folder / f"events.out.tfevents.{number:06}", 0
        self.pending = bytearray()  # content still to be written
        self.last_steps: dict[str, int] = {}  # step of the last image, by tag
        self.offset = offset_of_step(start, self.records.text)  # bytes of metrics.jsonl that are converted to events
        self.add(0, file_version="brain.Event:2")
        self.add(start, session_log=SessionLog(status=SessionLog.START))
        values = fields.flatten(fields.to_json(self.config))
        values = {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}
        experiment, session_start, self.session_end = hparams(values, {METRIC: None})
        self.add(0, summary=experiment)
        self.add(0, summary=session_start)
        # TensorBoard discards the images from ``start`` on too, and no checkpoint holds them: copy them from earlier
        # files. Those of the test split are drawn again.
        images = {
            (event.step, value.tag): value
            for events, _ in old_files
            for event in events
            for value in event.summary.value
            if start <= event.step <= step and value.HasField("image") and not value.tag.startswith("test/")
        }
        for (image_step, _), value in sorted(images.items(), key=lambda item: item[0]):
            self.add_value(image_step, value)

    def draw(self, step: int, tag: str, picture: Picture) -> None:
        """Queue an image for the next ``write``, unless there is one with this tag for ``step``."""
        from PIL import Image

        content = io.BytesIO()
        Image.fromarray(picture).save(content, "PNG")
        height, width, _ = picture.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content.getvalue())
        self.add_value(step, Summary.Value(tag=tag, image=image))

    def end(self) -> None:
        """Queue the event that marks the run as finished."""
        self.add(0, summary=self.session_end)

    def write(self) -> None:
        """Append new records and queued events to the file. Raise OSError on failure; the next call writes the rest."""
        if self.size and not self.path.exists():  # deleted by someone: write everything again
            self.begin(0)
        for line in bytes(self.records.text[self.offset :]).splitlines():
            record = json.loads(line)
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record).items()]
            self.add(record["step"], summary=Summary(value=values))
        self.offset = len(self.records.text)
        self.folder.mkdir(exist_ok=True)
        with self.path.open("r+b" if self.size else "wb", buffering=0) as file:
            file.seek(self.size)
            while self.pending:
                written = file.write(self.pending)
                self.size += written
                del self.pending[:written]

    def add_value(self, step: int, value: Any) -> None:
        if self.last_steps.get(value.tag) != step:
            self.last_steps[value.tag] = step
            self.add(step, summary=Summary(value=[value]))

    def add(self, step: int, **content: Any) -> None:
        self.pending += frame_event(Event(wall_time=time.time(), step=step, **content).SerializeToString())


def offset_of_step(step: int, text: bytes | bytearray) -> int:
    """Return the offset in ``text``, JSON lines, of the first record of ``step`` or a later one."""
    offset = len(text)
    while offset:
        line_start = text.rfind(b"\n", 0, offset - 1) + 1
        if json.loads(text[line_start:offset])["step"] < step:
            break
        offset = line_start
    return offset


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Return the scalars of a record by tag, such as {"train/loss": 0.3}."""
    values = {name: value for name, value in record.items() if name not in ("step", "epoch", "split")}
    return {f"{record['split']}/{name}": value for name, value in values.items() if isinstance(value, int | float)}


# --- Files ----------------------------------------------------------------------------------------------------------


def frame_event(content: bytes) -> bytes:
    """Return an event as stored in a file: its length and its content, each followed by a checksum."""
    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))


def read_events(path: Path) -> tuple[list[Any], bool]:
    """Return the events of a file, up to any damage or truncation, and whether it is intact. Raise OSError."""
    content, offset, events = path.read_bytes(), 0, []
    while offset < len(content):
        size = int.from_bytes(content[offset : offset + 8], "little")
        event = content[offset + 12 : offset + 12 + size]
        if content[offset : offset + size + 16] != frame_event(event):
            return events, False
        events.append(Event.FromString(event))
        offset += size + 16
    return events, True


# --- Images ---------------------------------------------------------------------------------------------------------


def mosaic(weights: Float[np.ndarray, "n h w"]) -> Picture:
    """Return the first 64 of ``weights`` as tiles of one image: positive blue, negative red, zero white."""
    weights = weights[:MAX_TILES]
    min_columns = math.ceil(math.sqrt(len(weights)))
    # Prefer full rows, unless they make a long strip.
    choices = range(min_columns, 2 * min_columns)
    columns = next((number for number in choices if len(weights) % number == 0), min_columns)
    scaled = np.nan_to_num(sheet(weights, columns) / max(np.abs(weights).max(), np.finfo(np.float32).tiny))
    # Take red and green from white for positive weights, green and blue for negative ones.
    removed = np.stack([np.maximum(scaled, 0), np.abs(scaled), np.maximum(-scaled, 0)], axis=-1)
    return enlarge((255 * (1 - removed)).round().astype(np.uint8), max(1, MOSAIC // scaled.shape[1]))


def confusion_picture(confusion: Int[np.ndarray, "classes classes"]) -> Picture:
    """Draw a confusion matrix: true classes in rows, predictions in columns, darker for larger fractions of a row."""
    from PIL import Image, ImageDraw, ImageFont

    classes = len(confusion)
    side = max(1, min(CELL, MATRIX // classes))
    # Errors are rare: the square root makes 1 % visible.
    shades = np.sqrt(class_fractions(confusion))
    cells = (255 + shades[..., None] * (np.array([8, 48, 107]) - 255)).round().astype(np.uint8)
    margins = (MARGIN, 8)
    picture = Image.fromarray(np.pad(enlarge(cells, side), (margins, margins, (0, 0)), constant_values=255))
    draw, font, end = ImageDraw.Draw(picture), ImageFont.load_default(13), MARGIN + classes * side
    draw.rectangle((MARGIN - 1, MARGIN - 1, end, end), outline="lightgrey")
    draw.text((4, 2), "rows: true classes\ncolumns: predictions", "black", font)
    centres = [MARGIN + (number + 0.5) * side for number in range(classes)]
    # Label only as many classes as fit.
    for number in range(0, classes, -(-24 // side)):
        draw.text((centres[number], MARGIN - 10), str(number), "black", font, anchor="mm")
        draw.text((MARGIN - 8, centres[number]), str(number), "black", font, anchor="rm")
    for row, column in np.argwhere(confusion) if side == CELL else ():
        colour = "white" if shades[row, column] > 0.6 else "black"
        draw.text((centres[column], centres[row]), str(confusion[row, column]), colour, font, anchor="mm")
    return np.asarray(picture)


def enlarge(picture: Picture, factor: int) -> UInt8[np.ndarray, "rows columns 3"]:
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
