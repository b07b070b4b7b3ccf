"""Which Debian packages lend pictures that people made, and which of their files: looked at one by one, drawings apart.

Photographs and pictures by human hands (paintings, drawings, digital art of games) are kinds of their own, so that a model can be
judged on each. Left out, by eye: renders, photographs that were painted over, screenshots, textures, drawings with nothing but
lines, and whatever may have come from a model. All of it was packaged in or before 2023 from sources of years before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["camera", "human-art"]
SIDE_PX = 320
SMALLEST_PX = 256


@dataclass(frozen=True, slots=True)
class Package:
    """Pictures of a package, one source: `files` are paths (patterns) below `folder`, or inside a Qt resource file there.

    crops: of each picture in training; a quarter of them of one for validation. licence: as the copyright file states it.
    smallest: shorter side below which one is passed over. judge: no picture of this source is trained on or calibrated with; what
    is tried is chosen by them (`split` "judge" of the manifest).
    """

    source: str
    licence: str
    folder: str
    files: tuple[str, ...]
    crops: int = 24
    kind: Kind = "camera"
    smallest: int = SIDE_PX
    judge: bool = False


GCOMPRIS = "usr/share/gcompris-qt/rcc"
GCOMPRIS_TERMS = "CC-BY, CC-BY-SA, CC0, GFDL, GPL and public domain, file by file"
ENDLESS_SKY = "usr/share/games/endless-sky/images"
WESNOTH = "usr/share/games/wesnoth/1.16/data"
WESNOTH_TERMS = "GPL-2+ and CC-BY-SA-4.0"

FIRST = (
    Package("lomiri-wallpapers-16.04", "CC-BY-4.0 and CC-BY-SA-4.0", "usr/share/backgrounds", (
        "Bridge_by_*", "Dragonfly_by_*", "Picture_0B_*", "Picture_1A_*", "Wine_by_*", "aitzgorri_by_*", "free_by_*",
        "friends_by_*", "greentock_by_*", "life_by_*", "picosdeeuropa_by_*", "seeding_by_*", "sunset_by_*",
    )),
    Package("lomiri-wallpapers-20.04", "CC-BY-4.0 and CC-BY-SA-4.0", "usr/share/backgrounds", ("Kleiber_by_*",)),
    Package("mate-backgrounds", "GPL-2+", "usr/share/backgrounds/mate/nature", (
        "Aqua.jpg", "Blinds.jpg", "Dune.jpg", "FreshFlower.jpg", "Garden.jpg", "GreenMeadow.jpg", "LadyBird.jpg", "RainDrops.jpg",
        "Storm.jpg", "TwoWings.jpg", "Wood.jpg", "YellowFlower.jpg",
    )),
    Package("plasma-workspace-wallpapers", "GPL-2+", "usr/share/wallpapers", tuple(
        f"{name}/contents/images/2560x1600.jpg"
        for name in ("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "Kite",
                     "OneStandsOut", "Path", "summer_1am")
    )),
    Package("gcompris-animals", GCOMPRIS_TERMS, GCOMPRIS, (
        "erase.rcc:*/resource/*.webp", "explore_farm_animals.rcc:*/animals/*.webp", "explore_world_animals.rcc:*/animals/*.webp",
    ), crops=8),
    Package("gcompris-places", GCOMPRIS_TERMS, GCOMPRIS, (
        "explore_monuments.rcc:*/resource/*/*.webp", "explore_world_music.rcc:*/music/*.webp", "clickgame.rcc:*/sea?.webp",
        *(f"details.rcc:*/{name}_background.webp" for name in (
            "EgeskovSlotSpejling", "GizahPyramids", "EilanDonanCastle", "TowerBridgeLondon", "Chenonceau", "NDP", "Nagoya",
            "TajMahal", "Neuschwanstein", "OperaSidney", "FanoeWindmill",
        )),
    ), crops=8),
)  # fmt: skip
"""What version 2026.11.27 was trained with; numbers of its crops hang on this order."""

PHOTOGRAPHS = (
    Package("endless-sky-data", "CC-BY-SA, CC-BY, CC0 and public domain, file by file", f"{ENDLESS_SKY}/land", ("*.jpg",),
            crops=3),
    Package("endless-sky-work", "public domain (Library of Congress)", f"{ENDLESS_SKY}/scene", ("loc?.jpg",), crops=3,
            smallest=SMALLEST_PX),
    Package("kphotoalbum", "GPL-2+", "usr/share/kphotoalbum/demo", ("*.jpg",), crops=12),
    Package("gnome-control-center-data", "GPL-2+, LGPL-2+ and CC0-1.0", "usr/share/pixmaps/faces", ("*.jpg",), crops=8),
    Package("palapeli-data", "GPL-2+", "usr/share/palapeli/collection", ("*.jpg",), crops=16),
    Package("tuxtype-data", "GPL-2+", "usr/share/tuxtype/images", ("kcas*.jpg",), crops=8, judge=True),
    Package("tuxpaint-data", "GPL-2+", "usr/share/tuxpaint/templates", ("*.jpg",), crops=8, judge=True),
    Package("opencv-doc", "Apache-2.0 and BSD-3-Clause", "usr/share/doc/opencv-doc/examples", (
        "alphamat/input_images/plant.jpg", "text/scenetext0[1-6].jpg", "text/scenetext_segmented_word0?.jpg",
        *(f"data/{name}" for name in (
            "aero1.jpg", "aloeL.jpg", "baboon.jpg", "basketball1.png", "board.jpg", "building.jpg", "butterfly.jpg",
            "chicky_512.png", "ela_original.jpg", "fruits.jpg", "home.jpg", "leuvenA.jpg", "messi5.jpg", "rubberwhale1.png",
            "squirrel_cls.jpg", "stuff.jpg", "sudoku.png",
        )),
    ), crops=8, judge=True),
    Package("plasma-workspace-data", "CC0-1.0 and GPL-2+", "usr/share/plasma/avatars/photos", ("*.png",), crops=8, judge=True),
    Package("lxqt-themes", "LGPL-2.1+", "usr/share/lxqt/wallpapers", (
        "Butterfly-Kenneth-Wimer.*", "Valendas.*", "after-the-rain.*", "appleflower.*", "beam.*", "butterfly.*", "cloud.*",
        "drop.*", "flowers.*", "fog.*", "this-is-not-windows.*",
    ), crops=24, judge=True),
)  # fmt: skip

ART = (
    Package("wesnoth-portraits", WESNOTH_TERMS, WESNOTH, ("core/images/portraits/*/*.png",), crops=2, kind="human-art"),
    Package("wesnoth-scenes", WESNOTH_TERMS, WESNOTH, (
        "core/images/story/*.jpg", "campaigns/*/images/story/*.jpg",
    ), crops=8, kind="human-art"),
    Package("wesnoth-campaigns", WESNOTH_TERMS, WESNOTH, ("campaigns/*/images/portraits/*.png",),
            crops=2, kind="human-art"),
    Package("gcompris-words", GCOMPRIS_TERMS, GCOMPRIS, ("lang.rcc:*.webp",), crops=2, kind="human-art"),
    Package("gcompris-paintings", GCOMPRIS_TERMS, GCOMPRIS, tuple(f"details.rcc:*/{name}*.webp" for name in (
        "Eglise_dAuvers", "Gogh4", "PortraitO", "Van_Gogh", "VincentVa",
    )), crops=8, kind="human-art"),
    Package("freeorion-data", "CC-BY-SA-3.0", "usr/share/games/freeorion/default/data/art/species", ("*.png",), crops=4,
            kind="human-art"),
    Package("crawl-tiles-data", "GPL-2+ and CC0-1.0", "usr/share/crawl/dat/tiles", ("title_*.png",), crops=8, kind="human-art",
            smallest=SMALLEST_PX, judge=True),
    Package("freecol", "GPL-2+ and public domain", "usr/share/games/freecol/default/resources/images/foundingFathers",
            ("*.size6.jpg",), crops=8, kind="human-art", judge=True),
    Package("wordpress-themes", "GPL-2+ and public domain", "usr/share/wordpress/wp-content/themes", (
        "twentytwentyone/assets/images/*.jpg", "twentytwentytwo/assets/images/ducks.jpg",
    ), crops=16, kind="human-art", judge=True),
    Package("unknown-horizons", "CC-BY-SA-3.0", "usr/share/unknown-horizons/content/gui/images/background/mainmenu",
            ("bg_?.png",), crops=24, kind="human-art", judge=True),
)  # fmt: skip

PACKAGES = FIRST + PHOTOGRAPHS + ART

DEBIAN = (
    *(
        "lomiri-wallpapers-16.04",
        "lomiri-wallpapers-20.04",
        "mate-backgrounds",
        "plasma-workspace-wallpapers",
        "gcompris-qt-data",
    ),
    *(
        "endless-sky-data",
        "kphotoalbum",
        "gnome-control-center-data",
        "palapeli-data",
        "tuxtype-data",
        "tuxpaint-data",
        "opencv-doc",
    ),
    *("plasma-workspace-data", "lxqt-themes", "wesnoth-1.16-data", "wesnoth-1.16-did", "wesnoth-1.16-httt", "wesnoth-1.16-sof"),
    *("wesnoth-1.16-tsg", "wesnoth-1.16-utbs", "freeorion-data", "crawl-tiles-data", "freecol", "unknown-horizons"),
    *("wordpress-theme-twentytwentyone", "wordpress-theme-twentytwentytwo"),
)
"""What to fetch, of Debian 12."""
