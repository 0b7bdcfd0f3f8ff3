"""What TensorBoard shows of a run: scalars, pictures, hyper-parameters.

An event file is a row of records that TensorBoard reads while they are added. It only ever grows: a run that goes on
from a checkpoint begins another file, whose first event takes back what the files before tell of later steps.
"""

import io
import json
import math
import struct
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.logs import Records

# The accuracy that TensorBoard's table of hyper-parameters shows.
METRIC = "test/accuracy"

# Pixels: about how wide a picture of weights is, how wide a confusion matrix is at most, and a cell of it.
MOSAIC, MATRIX, CELL = 480, 800, 40

MOST_TILES = 64

Picture = UInt8[np.ndarray, "height width 3"]


class Events:
    """The event files of a run: what ``metrics.jsonl`` holds, and pictures."""

    def __init__(self, folder: Path, records: Records, step: int, config: Config):
        """Goes on at ``step``, of which ``records`` hold all that is to stay. Raises OSError."""
        self.folder, self.records, self.config = folder, records, config
        folder.mkdir(exist_ok=True)
        self.begin(step)

    def begin(self, step: int) -> None:
        """Begins another file, the first to tell of ``step`` and what follows. Writes nothing yet. Raises OSError."""
        tensorboard = protocol()
        old = sorted(self.folder.glob("events.out.tfevents.*"))
        kept = [read_events(path) for path in old]
        # Where any of it is damaged, everything is told anew.
        start = step if old and all(whole for _, whole in kept) else 0
        number = 1 + max((int(path.suffix[1:]) for path in old if path.suffix[1:].isdecimal()), default=0)
        # TensorBoard reads the files in the order of their names.
        self.path, self.size = self.folder / f"events.out.tfevents.{number:06}", 0
        self.pending = bytearray()  # what the file lacks
        self.seen: dict[str, int] = {}  # the step of the last picture of each tag
        self.told = beginning_of(start, self.records.text)  # the bytes of metrics.jsonl that have become events
        self.add(0, file_version="brain.Event:2")
        self.add(start, session_log=tensorboard.SessionLog(status=tensorboard.SessionLog.START))
        hparams = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in fields.flatten(fields.to_json(self.config)).items()
        }
        described, started, self.ended = tensorboard.hparams(hparams, {METRIC: None})
        self.add(0, summary=described)
        self.add(0, summary=started)
        # Pictures from there on are taken back too, and no checkpoint holds them. The test comes again.
        pictures = {
            (event.step, value.tag): value
            for events, _ in kept
            for event in events
            for value in event.summary.value
            if start <= event.step <= step and value.HasField("image") and not value.tag.startswith("test/")
        }
        for (of, _), value in sorted(pictures.items(), key=lambda item: item[0]):
            self.add_value(of, value)

    def draw(self, step: int, tag: str, picture: Picture) -> None:
        """A picture after ``step`` updates, to be written with the next records; once for each tag and step."""
        from PIL import Image

        tensorboard, content = protocol(), io.BytesIO()
        Image.fromarray(picture).save(content, "PNG")
        height, width, channels = picture.shape
        image = tensorboard.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=content.getvalue()
        )
        self.add_value(step, tensorboard.Value(tag=tag, image=image))

    def end(self) -> None:
        """Says that the run is finished."""
        self.add(0, summary=self.ended)

    def write(self) -> None:
        """Writes what is new. Raises OSError, and has it still then."""
        if self.size and not self.path.exists():
            self.begin(0)
        tensorboard = protocol()
        for line in bytes(self.records.text[self.told :]).splitlines():
            record = json.loads(line)
            values = [tensorboard.Value(tag=tag, simple_value=value) for tag, value in scalars(record).items()]
            self.add(record["step"], summary=tensorboard.Summary(value=values))
        self.told = len(self.records.text)
        self.folder.mkdir(exist_ok=True)
        with self.path.open("r+b" if self.size else "wb", buffering=0) as file:
            file.seek(self.size)
            while self.pending:
                written = file.write(self.pending)
                self.size += written
                del self.pending[:written]

    def add_value(self, step: int, value: Any) -> None:
        if self.seen.get(value.tag) != step:
            self.seen[value.tag] = step
            self.add(step, summary=protocol().Summary(value=[value]))

    def add(self, step: int, **what: Any) -> None:
        self.pending += framed(protocol().Event(wall_time=time.time(), step=step, **what).SerializeToString())


def beginning_of(step: int, text: bytes | bytearray) -> int:
    """Where in the records ``text`` those of ``step``, and of later ones, begin."""
    place = len(text)
    while place:
        before = text.rfind(b"\n", 0, place - 1) + 1
        if json.loads(text[before:place])["step"] < step:
            break
        place = before
    return place


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers that a record tells, by their tags: {"train/loss": 0.3, …}."""
    values = {name: value for name, value in record.items() if name not in ("step", "epoch", "split")}
    return {f"{record['split']}/{name}": value for name, value in values.items() if isinstance(value, int | float)}


# --- Files ----------------------------------------------------------------------------------------------------------


@cache
def protocol() -> SimpleNamespace:
    """TensorBoard's messages."""
    # tensorboardX imports PyTorch wherever that is installed, which takes a second and is of no use here.
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import hparams
    finally:
        if hide:
            del sys.modules["torch"]
    return SimpleNamespace(
        Event=Event, SessionLog=SessionLog, Summary=Summary, Value=Summary.Value, Image=Summary.Image,
        hparams=hparams, masked_crc32c=masked_crc32c,
    )  # fmt: skip


def framed(content: bytes) -> bytes:
    """An event as it stands in a file: its length and its bytes, each with its checksum."""
    checksum = protocol().masked_crc32c
    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", checksum(length)) + content + struct.pack("<I", checksum(content))


def read_events(path: Path) -> tuple[list[Any], bool]:
    """The events in a file up to where it is cut off or damaged, and whether it is neither. Raises OSError."""
    content, place, events = path.read_bytes(), 0, []
    while place < len(content):
        size = int.from_bytes(content[place : place + 8], "little")
        event = content[place + 12 : place + 12 + size]
        if content[place : place + size + 16] != framed(event):
            return events, False
        events.append(protocol().Event.FromString(event))
        place += size + 16
    return events, True


# --- Pictures -------------------------------------------------------------------------------------------------------


def mosaic(weights: Float[np.ndarray, "n h w"]) -> Picture:
    """The first 64 of ``weights`` as tiles: blue where a pixel speaks for the output, red against it, white neither."""
    weights = weights[:MOST_TILES]
    count, height, width = weights.shape
    least = math.ceil(math.sqrt(count))
    # Full rows, where these make no long strip.
    columns = next((each for each in range(least, 2 * least) if count % each == 0), least)
    rows = -(-count // columns)
    strength = weights / max(np.abs(weights).max(), np.finfo(np.float32).tiny)
    # What is for an output takes red and green from white, what is against takes green and blue.
    taken = np.stack([np.maximum(strength, 0), np.abs(strength), np.maximum(-strength, 0)], axis=-1)
    sheet = np.full((rows * columns, height + 1, width + 1, 3), 255, np.uint8)
    sheet[:count, 1:, 1:] = (255 * (1 - taken)).round()
    # The white row and column that each tile begins with parts it from the one before.
    sheet = sheet.reshape(rows, columns, height + 1, width + 1, 3).swapaxes(1, 2)
    sheet = sheet.reshape(rows * (height + 1), columns * (width + 1), 3)[1:, 1:]
    scale = max(1, MOSAIC // sheet.shape[1])
    return sheet.repeat(scale, axis=0).repeat(scale, axis=1)


def confusion_picture(confusion: Int[np.ndarray, "classes classes"]) -> Picture:
    """A confusion matrix: classes in rows, answers in columns; the darker, the larger a share of its row."""
    from PIL import Image, ImageDraw, ImageFont

    classes = len(confusion)
    side = max(1, min(CELL, MATRIX // classes))
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    # Mistakes are few: the root lets one in a hundred be seen.
    shades = np.sqrt(shares)[..., None]
    colours = (255 + shades * (np.array([8, 48, 107]) - 255)).round().astype(np.uint8)
    left = top = 56
    sheet = np.full((top + classes * side + 8, left + classes * side + 8, 3), 255, np.uint8)
    sheet[top : top + classes * side, left : left + classes * side] = colours.repeat(side, axis=0).repeat(side, axis=1)
    picture = Image.fromarray(sheet)
    pen = ImageDraw.Draw(picture)
    names, numbers = ImageFont.load_default(16), ImageFont.load_default(13)
    middle = classes * side / 2
    pen.rectangle((left - 1, top - 1, left + classes * side, top + classes * side), outline="lightgrey")
    pen.text((left + middle, 16), "answer", "black", names, anchor="mm")
    label = Image.new("RGB", (80, 24), "white")
    ImageDraw.Draw(label).text((40, 12), "true class", "black", names, anchor="mm")
    picture.paste(label.rotate(90, expand=True), (4, int(top + middle) - 40))
    # Not more labels than there is room for.
    for place in range(0, classes, -(-24 // side)):
        centre = (place + 0.5) * side
        pen.text((left + centre, top - 12), str(place), "black", numbers, anchor="mm")
        pen.text((left - 8, top + centre), str(place), "black", numbers, anchor="rm")
    if side == CELL:
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                colour = "white" if shades[row, column, 0] > 0.6 else "black"
                spot = (left + (column + 0.5) * side, top + (row + 0.5) * side)
                pen.text(spot, str(count), colour, numbers, anchor="mm")
    return np.asarray(picture)
