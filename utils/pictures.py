"""Pictures for a person: sheets of masks and patterns, of heat maps, and of images with the trigger attached."""

import cv2
import numpy as np

from utils import photo_filters, transfer
from utils.files import replacing

TILE = 96                # pixels a picture's side is shown with
SHOWN = 12               # triggers on the sheet of attached images
RED, WHITE, GREY = (230, 60, 60), (255, 255, 255), (200, 200, 200)


def write(path, sheet):
    """Write an RGB picture, H×W×3 in [0, 1], as a PNG."""
    _, encoded = cv2.imencode(".png", np.rint(255 * sheet[..., ::-1]).astype(np.uint8))
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(encoded)


def trigger_sheet(arrays):
    """All labels' masked patterns over their masks, with label and ASR. arrays: of potential_triggers.h5."""
    return _sheet([(_stack(mask[..., None] * pattern, mask), f"{label}: {asr:.0%}", WHITE)
                   for label, (mask, pattern, asr) in enumerate(zip(arrays["mask"], arrays["pattern"], arrays["asr"]))])


def filter_sheet(arrays, images):
    """An image, and the same through every label's colour matrix, and its best photo filter if there are any.

    arrays: of potential_triggers_feature_space.h5; the share is the matrix' ASR.
    """
    return _sheet([_untouched(arrays, images)] + [(_attached(arrays, label, images), f"{label}: {asr:.0%}", WHITE)
                                                  for label, asr in enumerate(arrays["asr"])])


def heat_sheet(arrays):
    """All labels' heat maps over their preserved masks. arrays: of preserved_triggers.h5."""
    tiles = []
    for label, (heat, mask, threshold) in enumerate(zip(arrays["heat"], arrays["mask"], arrays["threshold"])):
        colours = cv2.applyColorMap(np.rint(255 * heat).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1] / 255.0
        note = "random" if np.isnan(threshold) else f"{threshold:.2f}"
        tiles.append((_stack(colours, mask), f"{label}: {note}", WHITE))
    return _sheet(tiles)


def attached_sheet(triggers, verdict, images):
    """Images with triggers attached: the infected labels' first, else those of the highest ASR."""
    infected = verdict["infected_labels"]
    others = [int(label) for label in np.argsort(-triggers["asr"]) if label not in infected]
    tiles = [_untouched(triggers, images)]
    for label in (infected + others)[:SHOWN]:
        tiles.append((_attached(triggers, label, images), f"{label}: infected" if label in infected else f"{label}: clean",
                      RED if label in infected else WHITE))
    return _sheet(tiles)


def _untouched(triggers, images):
    image = images[0] / 255.0
    return _stack(image, image) if _bred(triggers) else image, "image", GREY


def _attached(triggers, label, images):
    """The first image with a label's trigger attached; of filters through its matrix, over that through its best probe."""
    picture = transfer.attach(images[:1], transfer.trigger_of(triggers, label)).numpy()[0]
    if not _bred(triggers):
        return picture
    return _stack(picture, photo_filters.attached(images[None, :1], triggers["probes"][label, :1]).numpy()[0, 0])


def _bred(triggers):
    return "probes" in triggers


def _stack(above, below):
    return np.concatenate([_colour(above), _colour(below)])


def _colour(picture):
    picture = picture[..., None] if picture.ndim == 2 else picture
    return np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture


def _sheet(tiles):
    """Tiles (picture in [0, 1], text, colour of the text) side by side, in rows of twelve or fewer."""
    drawn = []
    for picture, text, colour in tiles:
        picture = _colour(np.asarray(picture, np.float32))
        height = max(1, round(TILE * picture.shape[0] / picture.shape[1]))
        picture = cv2.resize(picture, (TILE, height), interpolation=cv2.INTER_NEAREST)
        band = np.zeros((20, TILE, 3), np.uint8)
        cv2.putText(band, text, (2, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, 1, cv2.LINE_AA)
        drawn.append(np.pad(np.concatenate([picture, band / 255.0]), ((2, 2), (2, 2), (0, 0))))
    columns = min(12, len(drawn))
    drawn += [np.zeros_like(drawn[0])] * (-len(drawn) % columns)
    return np.clip(np.concatenate([np.concatenate(drawn[start:start + columns], axis=1)
                                   for start in range(0, len(drawn), columns)]), 0.0, 1.0)
