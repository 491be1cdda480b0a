"""What a synthetic field may look like: the classes of cells, the stains, and the settings of a field."""

from dataclasses import dataclass, replace

STAIN_NAMES = ("DNA", "RNA", "ER", "AGP", "Mito", "Phase")


@dataclass(frozen=True, kw_only=True)
class CellType:
    """What the cells of one class have in common; each cell departs from it by chance.

    Lengths are shares of the cell's own radius unless said otherwise, strengths are relative to the class "epithelial".
    """

    name: str
    radius: float  # of ``cell_radius_px``
    aspect: float  # length / width
    protrusions: int  # arms that reach out of the outline
    arm: float  # length of an arm
    nucleus: float  # radius of the nucleus
    nucleus_aspect: float
    chromatin: float  # contrast of the DNA texture
    chromatin_grain: float  # its size, in pixels of the texture sheet a pixel: small is coarse
    nucleoli: float  # how many, on average
    brightness: float
    reach: float  # how far ER and mitochondria spread from the nucleus
    edge_actin: float
    fibre_actin: float
    golgi: float  # radius of the Golgi's cloud
    mito_grain: float


CELL_TYPES = (
    CellType(
        name="epithelial", radius=1.0, aspect=1.2, protrusions=0, arm=0.0, nucleus=0.48, nucleus_aspect=1.25,
        chromatin=0.16, chromatin_grain=1.0, nucleoli=2.5, brightness=1.0, reach=0.5, edge_actin=1.0,
        fibre_actin=0.35, golgi=0.22, mito_grain=1.0,
    ),
    CellType(
        name="spindle", radius=0.95, aspect=2.3, protrusions=2, arm=0.9, nucleus=0.44, nucleus_aspect=1.9,
        chromatin=0.12, chromatin_grain=1.4, nucleoli=1.5, brightness=0.9, reach=0.75, edge_actin=0.5,
        fibre_actin=1.1, golgi=0.18, mito_grain=1.3,
    ),
    CellType(
        name="round", radius=0.72, aspect=1.05, protrusions=0, arm=0.0, nucleus=0.6, nucleus_aspect=1.08,
        chromatin=0.3, chromatin_grain=0.9, nucleoli=1.0, brightness=1.35, reach=0.35, edge_actin=1.3,
        fibre_actin=0.1, golgi=0.3, mito_grain=1.9,
    ),
    CellType(
        name="spread", radius=1.35, aspect=1.3, protrusions=4, arm=0.35, nucleus=0.42, nucleus_aspect=1.2,
        chromatin=0.07, chromatin_grain=1.7, nucleoli=5.0, brightness=0.7, reach=0.95, edge_actin=0.45,
        fibre_actin=0.8, golgi=0.5, mito_grain=0.75,
    ),
)  # fmt: skip


# Classes for the demo, further apart than `CELL_TYPES` in size, outline and texture: a small network can learn them in
# a minute, although each stain shows them differently.
CELL_LINES = (
    replace(CELL_TYPES[0], aspect=1.1, chromatin=0.2, mito_grain=0.9),
    replace(CELL_TYPES[1], radius=0.8, aspect=4.6, arm=0.5, nucleus=0.48, nucleus_aspect=3.0, chromatin_grain=1.8,
            reach=0.9, edge_actin=0.3, fibre_actin=1.8, mito_grain=1.7),
    replace(CELL_TYPES[2], radius=0.48, nucleus=0.68, chromatin=0.6, chromatin_grain=0.8, edge_actin=1.6,
            mito_grain=2.4),
    replace(CELL_TYPES[3], radius=1.6, nucleus=0.38, chromatin=0.04, reach=1.2, golgi=0.6, mito_grain=0.45),
)  # fmt: skip


def _shape(
    name: str, *, radius: float, aspect: float, nucleus_aspect: float, arms: int = 0, arm: float = 0.0
) -> CellType:
    """Return the class "epithelial" with another outline; lengths relative to the radius keep their size in pixels."""
    plain = CELL_TYPES[0]
    return replace(
        plain,
        name=name,
        radius=radius,
        aspect=aspect,
        protrusions=arms,
        arm=arm,
        nucleus=plain.nucleus / radius,
        nucleus_aspect=nucleus_aspect,
        reach=plain.reach / radius,
        golgi=plain.golgi / radius,
    )


# Classes that differ only in the outlines of cells and nuclei; the radii compensate for the area of the arms. They can
# hardly be classified by brightness and texture.
CELL_SHAPES = (
    _shape("disc", radius=1.0, aspect=1.0, nucleus_aspect=1.0),
    _shape("rod", radius=1.04, aspect=2.6, nucleus_aspect=2.2),
    _shape("two arms", radius=0.88, aspect=1.1, nucleus_aspect=1.5, arms=2, arm=1.2),
    _shape("star", radius=0.81, aspect=1.0, nucleus_aspect=1.0, arms=5, arm=0.9),
)


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Appearance of a field. The same seed gives the same cells for any channels, noise and bit depth.

    Attributes
    ----------
    size
        Rows and columns, in pixels.
    channels
        Stains, in order: names from :data:`STAIN_NAMES`; ``("Phase",)`` is a phase-contrast image.
    num_cells
        Minimum and maximum number of drawn cells. Cells that do not fit, or whose nucleus is covered by a neighbour
        or mostly outside the image, are removed, so a field may contain fewer.
    cell_radius_px
        Radius of a typical cell, in pixels.
    touching
        Share of the cells, in [0, 1], that touch another cell; the others are isolated while there is space.
    cell_types
        The classes: :data:`CELL_TYPES`, which differ in everything, :data:`CELL_LINES`, which differ more,
        :data:`CELL_SHAPES`, which differ in outline only, or your own.
    num_classes
        Number of classes that occur.
    class_weights
        Relative frequency of each class, ``num_classes`` numbers; None: all equal. ``(0, 1, 0, 0)``: one class only.
    blur_px
        Minimum and maximum standard deviation of the focus blur, drawn per field and channel.
    haze
        Share of out-of-focus light, in [0, 1).
    illumination
        Maximum relative darkening of a corner, in [0, 1).
    photons
        Photons per pixel at the brightness of a typical cell: fewer mean more shot noise.
    read_noise
        Standard deviation of the read noise of the camera, in photons.
    bit_depth
        8 or 16.
    """

    size: tuple[int, int] = (256, 256)
    channels: tuple[str, ...] = ("DNA", "RNA", "ER", "AGP", "Mito")
    num_cells: tuple[int, int] = (24, 44)
    cell_radius_px: float = 18.0
    touching: float = 0.7
    cell_types: tuple[CellType, ...] = CELL_TYPES
    num_classes: int = 4
    class_weights: tuple[float, ...] | None = None
    blur_px: tuple[float, float] = (0.7, 1.4)
    haze: float = 0.35
    illumination: float = 0.3
    photons: float = 1200.0
    read_noise: float = 3.0
    bit_depth: int = 16

    def __post_init__(self) -> None:
        """Reject invalid values, in one line each."""

        def expect(holds: bool, name: str, expected: str) -> None:
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        expect(len(self.size) == 2 and min(self.size) >= 16, "size", "(rows, columns) of at least 16 px each")
        unknown = [name for name in self.channels if name not in STAIN_NAMES]
        expect(bool(self.channels) and not unknown, "channels", f"some of {', '.join(STAIN_NAMES)}")
        expect(len(set(self.channels)) == len(self.channels), "channels", "each stain once")
        expect(len(self.num_cells) == 2 and 0 <= self.num_cells[0] <= self.num_cells[1], "num_cells",
               "(minimum, maximum) with 0 <= minimum <= maximum")  # fmt: skip
        expect(self.cell_radius_px >= 4, "cell_radius_px", "at least 4")
        expect(0 <= self.touching <= 1, "touching", "a share in [0, 1]")
        most = len(self.cell_types)
        expect(1 <= self.num_classes <= most, "num_classes", f"a number from 1 to {most}, that of cell_types")
        if self.class_weights is not None:
            right = len(self.class_weights) == self.num_classes and min(self.class_weights) >= 0
            expect(right and sum(self.class_weights) > 0, "class_weights",
                   f"{self.num_classes} numbers (num_classes) of at least 0, not all 0")  # fmt: skip
        expect(len(self.blur_px) == 2 and 0 < self.blur_px[0] <= self.blur_px[1], "blur_px",
               "(minimum, maximum) with 0 < minimum <= maximum")  # fmt: skip
        expect(0 <= self.haze < 1, "haze", "a share in [0, 1)")
        expect(0 <= self.illumination < 1, "illumination", "a share in [0, 1)")
        expect(0 < self.photons < 1e9, "photons", "a number above 0 and below 1e9")
        expect(self.read_noise >= 0, "read_noise", "at least 0")
        expect(self.bit_depth in (8, 16), "bit_depth", "8 or 16")
