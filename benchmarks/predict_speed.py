"""Speed of `dlfer predict`: images per second in batches and one at a time, and the memory during a long video.

    python benchmarks/predict_speed.py                # 200 synthetic images with one face each
    python benchmarks/predict_speed.py --video 2000    # a video of 2,000 frames, with memory and speed by tenths

The complete pipeline is timed: decoding, face detection, cropping, and prediction. One at a time means a loop with
`read_image` and a new `FacePredictor` for each image, as in a simple script without batches.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from timing import tell_row, write_figures

import dlfer
from dlfer.config.names import FER2013_LABELS
from dlfer.data.synthetic.faces import draw_face
from dlfer.predict.draw import VideoWriter
from dlfer.predict.media import open_inputs
from dlfer.predict.predictor import FacePredictor, predict_inputs


def draw_photo(rng: np.random.Generator) -> np.ndarray:
    """Return an image, uint8 [240, 320, 3], with one drawn face of 120 pixels on a plain background."""
    face = draw_face(FER2013_LABELS[rng.integers(7)], rng=rng)
    photo = np.full((240, 320, 3), 128, np.uint8)
    x, y = rng.integers(0, 200), rng.integers(0, 120)
    photo[y : y + 120, x : x + 120] = np.asarray(Image.fromarray(face.reshape(48, 48)).resize((120, 120)))[..., None]
    return photo


def get_resident_megabytes() -> float:
    """Return the resident memory of this process in megabytes; needs Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure_pictures(model: str, num_pictures: int, faces: str) -> dict:
    """Return images per second, in batches and one at a time, over all images after a warm-up."""
    rng, classifier = np.random.default_rng(0), dlfer.load(model)
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for number in range(num_pictures):
            names.append(f"{folder}/{number:04}.jpg")
            Image.fromarray(draw_photo(rng)).save(names[-1], quality=92)
        predictor = FacePredictor(classifier, faces=faces)
        list(predict_inputs(predictor, open_inputs(names[:40])))
        start = time.perf_counter()
        together = [result.faces for result in predict_inputs(predictor, open_inputs(names))]
        middle = time.perf_counter()
        alone = [FacePredictor(classifier, faces=faces).predict([dlfer.read_image(name)])[0] for name in names]
        end = time.perf_counter()
    pairs = [(a, b) for x, y in zip(together, alone, strict=True) for a, b in zip(x, y, strict=True)]
    return {
        "pictures": num_pictures,
        "faces": sum(len(found) for found in together),
        "detector": faces,
        "together_per_second": round(num_pictures / (middle - start), 2),
        "one_by_one_per_second": round(num_pictures / (end - middle), 2),
        "largest_difference": max((abs(a.confidence - b.confidence) for a, b in pairs), default=0.0),
    }


def measure_video(model: str, num_frames: int, faces: str) -> dict:
    """Return the resident memory and the frames per second for each tenth of a video with a moving face."""
    rng, predictor = np.random.default_rng(0), FacePredictor(dlfer.load(model), faces=faces)
    face = np.asarray(Image.fromarray(draw_face("Happy", rng=rng).reshape(48, 48)).resize((120, 120)))[..., None]
    with tempfile.TemporaryDirectory() as folder:
        writer = VideoWriter(Path(folder) / "video.mp4", rate=25)
        for index in range(num_frames):
            frame = np.full((240, 320, 3), 128, np.uint8)
            x = 100 + round(80 * np.sin(index / 40))
            frame[60:180, x : x + 120] = face
            writer.write(frame)
        writer.close()
        memory, rates, tracks, start = [], [], set(), time.perf_counter()
        for number, result in enumerate(predict_inputs(predictor, open_inputs([str(writer.path)])), start=1):
            tracks |= {found.track for found in result.faces}
            if number % max(1, num_frames // 10) == 0:
                memory.append(round(get_resident_megabytes()))
                rates.append(round(max(1, num_frames // 10) / (time.perf_counter() - start), 1))
                start = time.perf_counter()
    return {
        "frames": num_frames,
        "detector": faces,
        "tracks": len(tracks),
        "megabytes": memory,
        "frames_per_second": rates,
    }


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lite2_96")
    parser.add_argument("--faces", default="opencv")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--video", type=int, metavar="FRAMES")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    given = parser.parse_args()
    rows: list[dict] = []
    if given.video:
        tell_row(measure_video(given.model, given.video, given.faces), rows)
    else:
        tell_row(measure_pictures(given.model, given.pictures, given.faces), rows)
    write_figures(given.json, rows, "tensorflow-cpu", "tensorflow", "keras", "numpy", "pillow")


if __name__ == "__main__":
    main()
