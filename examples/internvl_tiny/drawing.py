"""Pictures for InternVL-tiny: strings of real handwritten digits, coloured shapes, printed words.

Everything is drawn from a `random.Random` and nothing else, so a picture is a pure function of its seed. Sizes are
chosen for 64 px tiles: about two digits or four letters per tile, shapes of at least 20 px, up to four in a tile. This
module also owns which handwriting and which words belong to train, val and test; it asks no questions.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

Split = Literal["train", "val", "test"]
RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]

SPLITS: tuple[Split, ...] = ("train", "val", "test")
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS: dict[str, RGB] = {
    "red": (214, 30, 36), "green": (28, 140, 52), "blue": (32, 70, 208), "yellow": (248, 216, 0),
    "purple": (132, 36, 160), "orange": (246, 130, 16), "black": (16, 16, 18), "white": (255, 255, 255),
}  # fmt: skip
PASTELS: tuple[RGB, ...] = ((186, 196, 206), (206, 198, 186), (196, 196, 198))
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "STIXGeneral", "STIXGeneralBol", "DejaVuSans-Oblique", "DejaVuSerif-Italic",
)  # fmt: skip
TILE = 64
# Columns, rows, shapes along each side of a tile -> share among the layouts with room enough.
LAYOUTS: dict[tuple[int, int, int], int] = {
    (1, 1, 2): 10, (1, 1, 1): 8, (2, 1, 1): 5, (1, 2, 1): 5, (3, 1, 1): 3, (1, 3, 1): 3, (2, 2, 1): 4, (2, 1, 2): 3,
    (1, 2, 2): 3, (3, 2, 1): 2, (2, 3, 1): 2,
}  # fmt: skip
WORDS = tuple("""
able about above acid actor after again agree ahead album alive alone amber angel anger ankle apple april apron arena
arrow artist asleep atom aunt autumn award baby badge baker ball banana band bank barn basket bath beach bean bear
beard beauty bed bell belt bench berry bike bird blade blanket board boat bone book boot border bottle bowl box brain
branch brave bread brick bridge bright broom brother brush bucket bug build bus butter button cabin cable cactus cake
camel camera camp candle candy canyon cap car card carpet carrot castle cat cattle cave center chain chair chalk
change cheese cherry chess chest chicken child circus city clean clock cloud coast coat coffee coin cold color comb
cook copper coral corn cotton couch cow crab crane cream crown cup curtain cycle dad dance danger dark data day deep
deer desert desk dinner doctor dog dollar dolphin door dragon drawer dream dress drink drum duck dust eagle ear earth
east easy egg eight elbow empty engine enjoy evening eye fabric face family farm fast father feather fence field fig
film finger fire fish flag flower fly forest fork fox frame fresh friend frog fruit garden garlic gate gift giraffe
girl glass globe glove goat gold golf grape grass green guitar hair hammer hand happy harbor hat hawk head heart
hello help hen hero hill honey horse hotel house human hunter ice image infant inside island ivory jacket jar jazz
jelly jewel join judge juice jump jungle kettle key kind king kitchen kite kitten knee knife ladder lake lamp large
laugh leaf learn lemon letter library light lion lizard lunch machine magic magnet map maple market mask meadow
medal melon metal milk mirror model money monkey month moon morning mother motor mouse mouth music nail name napkin
neck needle nest night nine nose number oak oasis object ocean office olive onion open orange orbit owl oyster page
paint palace panda paper parent park parrot path peach peanut pear pencil penguin people pepper piano picture pig
pillow pilot planet plate pocket poem pond potato prince puzzle queen quick quiet rabbit radio rain read ribbon rice
ring river road robot rock rocket roof rope rose ruler sad sail salad salt sand school science sea seed seven shadow
shark sheep shell shirt shoe silver singer sister sky sleep smile snake snow soap soccer sock sofa soup south spider
spoon spring square star station stone storm story street student sugar summer sun swan sweater table tailor tea
teacher team tent theater ticket tiger time toast today tomato tooth tower town toy train travel tree truck turtle
umbrella uncle unicorn valley vase velvet village violin voice wagon wall walnut warm watch water weather whale wheat
wheel wind window winter wolf woman wood world yard year yellow yogurt young zebra zero
""".split())  # fmt: skip
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CASED = frozenset("abdefghmnqrt")  # lower and upper case look different at any size


def word_split(word: str) -> Split:
    """Split that owns a word, whatever its case: a checksum gives 80/10/10, for words and letter strings alike."""
    bucket = zlib.crc32(word.lower().encode()) % 10
    return "test" if bucket == 0 else "val" if bucket == 1 else "train"


@cache
def vocabulary(split: Split) -> tuple[str, ...]:
    """Lower-case words of `WORDS` that belong to `split`."""
    return tuple(word for word in WORDS if word_split(word) == split)


def random_word(rng: random.Random, split: Split, letter_share: float = 0.4) -> str:
    """A word of 3-7 letters of `split`, all lower or all upper case; `letter_share` of them are random letters."""
    word = rng.choice(vocabulary(split))
    while rng.random() < letter_share:
        word = "".join(rng.choices(_LETTERS, k=rng.randint(3, 7)))
        if word_split(word) == split and not _CASED.isdisjoint(word):
            break
        letter_share = 1.0
    return word.upper() if rng.random() < 0.5 else word


@cache
def handwriting_indices(split: Split) -> tuple[tuple[int, ...], ...]:
    """Rows of `sklearn.datasets.load_digits` in `split`, one tuple per digit: 80/10/10 within each digit.

    The split is by sample, shuffled once with a fixed seed. The data set carries no writer names, so a writer may
    appear on both sides; no single glyph does.
    """
    labels = _load_digits()[1]
    chosen = []
    for digit in range(10):
        rows = [row for row, label in enumerate(labels) if label == digit]
        random.Random(digit).shuffle(rows)
        first, second = int(0.8 * len(rows)), int(0.9 * len(rows))
        chosen.append(tuple({"train": rows[:first], "val": rows[first:second], "test": rows[second:]}[split]))
    return tuple(chosen)


@cache
def _load_digits() -> tuple[list, list[int]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the handwritten digits come from scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    return data.images, data.target.tolist()


@cache
def _glyph(row: int) -> Image.Image:
    """Ink of one handwritten digit, 12x12 "L": the 8x8 scan with a border of 2, strokes lifted to full ink."""
    pixels = _load_digits()[0][row]
    glyph = Image.new("L", (12, 12))
    glyph.paste(Image.frombytes("L", (8, 8), bytes(min(255, int(v * 20)) for v in pixels.ravel())), (2, 2))
    return glyph


def strip_canvas(rng: random.Random, tiles: int) -> tuple[int, int]:
    """(long, short) side in pixels of a strip of about `tiles` tiles in a row; one in seven is flatter.

    One-tile strips stay nearer to 1:1 than to 3:2, which would cost seven tiles for one digit.
    """
    long = round(64 * tiles * rng.uniform(0.94, 1.06))
    flat = tiles > 1 and rng.random() < 0.15
    return long, rng.randint(40, 46) if flat else rng.randint(58, 64)


def _inks(rng: random.Random) -> tuple[RGB, RGB]:
    """(ink, paper) of high contrast: a dark, slightly coloured ink on light paper."""
    dark, light = rng.randint(0, 50), rng.randint(215, 245)
    return tuple(dark + rng.randint(0, 30) for _ in range(3)), tuple(light + rng.randint(-10, 10) for _ in range(3))


def _paper(rng: random.Random, size: tuple[int, int], color: RGB) -> Image.Image:
    """Plain paper of `color` with a soft gradient of at most 12 levels."""
    corners = bytes(min(255, max(0, level + rng.randint(-12, 12))) for _ in range(4) for level in color)
    return Image.frombytes("RGB", (2, 2), corners).resize(size, Image.Resampling.BILINEAR)


def number_image(rng: random.Random, digits: str, split: Split, tall: bool = False) -> Image.Image:
    """Handwritten `digits` in a row, or in a column read downwards when `tall`: RGB, 32 px a digit, 64 for one alone.

    Each digit sits in a slot of its own; position (2 px), size (a tenth), turn (5 degrees; 10 in training), ink and
    paper vary in every split. Digits to train on are slanted and stretched too, as other hands would write them: there
    are few scans.
    """
    long, short = strip_canvas(rng, (len(digits) + 1) // 2)
    ink, paper = _inks(rng)
    image = _paper(rng, (short, long) if tall else (long, short), paper)
    slot, turn = long / len(digits), 10 if split == "train" else 5
    slant, stretch = (0.25, 0.16) if split == "train" else (0.0, 0.0)
    for place, digit in enumerate(digits):
        side = min(0.94 * slot, 0.84 * short) * rng.uniform(0.9, 1.0)
        along, across = (place + 0.5) * slot + rng.uniform(-2, 2), short / 2 + rng.uniform(-2, 2)
        along = min(max(along, side / 2 + 1), long - side / 2 - 1)
        glyph = _glyph(rng.choice(handwriting_indices(split)[int(digit)]))
        angle = rng.uniform(-turn, turn)
        hand = random.Random(angle)  # not rng: the texts, and so the vocabulary, stay what they are
        shape = hand.uniform(-slant, slant), math.exp(hand.uniform(-stretch, stretch))
        mask = _turned(glyph, side, angle, *shape)
        x, y = (across, along) if tall else (along, across)
        image.paste(ink, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)
    return image


def _turned(glyph: Image.Image, side: float, degrees: float, slant: float, stretch: float) -> Image.Image:
    """`glyph` enlarged so that its 8x8 scan measures `side` pixels, turned about its centre (bicubic).

    Before the turn it is slanted, by `slant` columns a row, and made `stretch` times narrower and taller.
    """
    size = math.ceil(side * 1.5)
    cos, sin = (8 / side * f(math.radians(degrees)) for f in (math.cos, math.sin))
    a, b = cos * stretch - sin * slant, sin * stretch + cos * slant
    c, d = -sin / stretch, cos / stretch
    matrix = (a, b, 6 - (a + b) * size / 2, c, d, 6 - (c + d) * size / 2)
    return glyph.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def word_image(rng: random.Random, word: str) -> Image.Image:
    """`word` printed in one of ten typefaces: RGB, one tile for three letters, two or three tiles for more."""
    tiles = 1 if len(word) <= 3 else 3 if len(word) >= 6 and (word.isupper() or rng.random() < 0.3) else 2
    width, height = strip_canvas(rng, tiles)
    ink, paper = _inks(rng)
    image = _paper(rng, (width, height), paper)
    name = rng.choice(FONTS)
    fitting = 32 * rng.uniform(0.86, 0.94) * (width - 6) / _font(name, 32).getlength(word)
    font = _font(name, int(max(12, min(fitting, 0.72 * height))))
    left, top, right, bottom = font.getbbox(word)
    x = (width - (right - left)) / 2 + rng.uniform(-2, 2) - left
    y = (height - (bottom - top)) / 2 + rng.uniform(-2, 2) - top
    ImageDraw.Draw(image).text((round(x), round(y)), word, fill=ink, font=font)
    return image


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the typefaces come with matplotlib: pip install matplotlib") from error
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)


@dataclass(frozen=True)
class Item:
    """One shape: its kind (`SHAPES`), colour name (`COLORS`), side before turning (px), turn (degrees), tight box.

    `box` is (left, top, right, bottom) in image pixels, right and bottom exclusive.
    """

    kind: str
    color: str
    side: int
    turn: int
    box: Box


@dataclass(frozen=True)
class Scene:
    """Non-overlapping shapes on a plain background, row by row from the left; `size` is (width, height) in pixels."""

    size: tuple[int, int]
    background: RGB
    items: tuple[Item, ...]

    def render(self) -> Image.Image:
        """RGB image of `size`; pixels outside the boxes have exactly the background colour."""
        image = Image.new("RGB", self.size, self.background)
        for item in self.items:
            image.paste(COLORS[item.color], item.box[:2], _shape_mask(item.kind, item.side, item.turn))
        return image


def random_scene(rng: random.Random) -> Scene:
    """A scene of 1-5 shapes in reading order, each number as likely; half of them repeat a few kinds and colours.

    Each shape has a cell of the canvas to itself, a tile or a quarter of one, and varies in it in size and in place.
    """
    wanted = rng.randint(1, 5)
    layouts = [layout for layout in LAYOUTS if math.prod(layout) * layout[2] >= wanted]
    columns, rows, density = rng.choices(layouts, [LAYOUTS[layout] for layout in layouts])[0]
    few = rng.random() < 0.5
    kinds = rng.sample(SHAPES, rng.randint(1, 3)) if few else SHAPES
    colors = rng.sample(list(COLORS), rng.randint(1, 3)) if few else list(COLORS)
    cells = [(x, y) for y in range(rows * density) for x in range(columns * density)]
    chosen = sorted(rng.sample(range(len(cells)), wanted))
    items = [_place(rng, cells[index], TILE // density, rng.choice(kinds), rng.choice(colors)) for index in chosen]
    return Scene((TILE * columns, TILE * rows), rng.choice(PASTELS), tuple(items))


def _place(rng: random.Random, cell: tuple[int, int], length: int, kind: str, color: str) -> Item:
    """A shape inside a cell of `length` px, at least 1 px from its border and at most 8 px from its middle."""
    side = rng.randint(34, 44) if length == TILE else rng.randint(22, 26)
    turn = rng.choice((-15, 0, 0, 15))
    mask = _shape_mask(kind, side, turn)
    left, top = (
        length * index + (length - extent) // 2 + rng.randint(-reach, reach)
        for index, extent in zip(cell, mask.size, strict=True)
        for reach in (min(8, (length - extent) // 2 - 1),)
    )
    return Item(kind, color, side, turn, (left, top, left + mask.width, top + mask.height))


@cache
def _shape_mask(kind: str, side: int, turn: int) -> Image.Image:
    """Anti-aliased ink of a shape, cropped to the pixels that are at least a quarter covered: its box is tight."""
    radius, centre = 2 * side, 3 * side
    large = Image.new("L", (6 * side, 6 * side))
    pen = ImageDraw.Draw(large)
    if kind == "circle":
        pen.ellipse((centre - radius, centre - radius, centre + radius, centre + radius), fill=255)
    else:
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        pen.polygon([(centre + radius * (cos * x - sin * y), centre + radius * (sin * x + cos * y))
                     for x, y in _outline(kind)], fill=255)  # fmt: skip
    small = large.reduce(4).point([0] * 64 + list(range(64, 256)))
    return small.crop(small.getbbox())


def _outline(kind: str) -> list[tuple[float, float]]:
    """Corners of an upright shape inside the square from -1 to 1, y pointing down."""
    if kind == "square":
        return [(-0.92, -0.92), (0.92, -0.92), (0.92, 0.92), (-0.92, 0.92)]
    if kind == "triangle":
        return [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]
    if kind == "star":
        turns = [(1.05 if k % 2 == 0 else 0.45, math.pi * k / 5) for k in range(10)]
        return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in turns]
    a = 0.34
    return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
