"""Speed of `dlfer predict` on a video, and agreement of the predictions if faces are detected less often.

    python benchmarks/video_speed.py                   # a video of docs/astronaut.jpg with a moving, zooming, tilting
    camera python benchmarks/video_speed.py --video talk.mp4   # your own video

The variants, in turns: all steps sequentially without threads, on every frame; the same in the pipeline of
`predict_inputs`; and the pipeline with detection on every k-th frame. Agreement is better measured on your own video,
since the expression in a photograph does not change. For scale, the variant `shifted` detects faces in every frame and
moves each box by half a pixel.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from timing import Timing, add_options, describe_ratio, tell_row, time_by_turns, write_figures

import dlfer
from dlfer.predict.crops import Cropper, FaceTracker, choose_interval, compute_overlap
from dlfer.predict.draw import VideoWriter
from dlfer.predict.media import open_inputs
from dlfer.predict.predictor import FacePrediction, FacePredictor, predict_inputs
from dlfer.predict.video import load_opencv, read_video

PHOTO = Path(__file__).parents[1] / "docs" / "astronaut.jpg"
BATCH = 32


def write_video(path: Path, *, num_frames: int, rate: float = 25.0, size: tuple[int, int] = (640, 480)) -> None:
    """Write a video of a photograph: moved by up to 110 pixels a second, zoomed, tilted, with changing light, noise."""
    cv2, rng = load_opencv(), np.random.default_rng(0)
    photo = np.asarray(Image.open(PHOTO).convert("RGB"))
    height, width = photo.shape[:2]
    writer = VideoWriter(path, rate=rate)
    for index in range(num_frames):
        turn = 2 * np.pi * index / rate
        middle = np.array([0.45 * width + 40 * np.sin(turn / 2.3), 0.35 * height + 25 * np.cos(turn / 1.7)])
        matrix = cv2.getRotationMatrix2D(middle.tolist(), 8 * np.sin(turn / 3), 1.2 + 0.4 * np.sin(turn / 4))
        matrix[:, 2] += np.divide(size, 2) - middle
        frame = cv2.warpAffine(photo, matrix, size, borderMode=cv2.BORDER_REPLICATE)
        frame = frame * (1 + 0.15 * np.sin(turn / 2)) + rng.normal(0, 3, frame.shape)
        writer.write(frame.clip(0, 255).astype(np.uint8))
    writer.close()


def predict_in_turn(predictor: FacePredictor, video: str, smooth: float) -> list[list[FacePrediction]]:
    """Return the faces of each frame, with decoding, detection and classification done sequentially, in batches."""
    tracker, found = FaceTracker(smooth=smooth), []
    frames: list[tuple[float, np.ndarray]] = []

    def empty() -> None:
        for (seconds, _), faces in zip(frames, predictor.predict([image for _, image in frames]), strict=True):
            values = np.array([list(face.probabilities.values()) for face in faces])
            numbers, smoothed = tracker.update([face.box for face in faces], values.reshape(len(faces), -1), seconds)
            rows = zip(faces, numbers, smoothed, strict=True)
            found.append([predictor.judge(row, face.box, score=face.score, track=number) for face, number, row in rows])
        frames.clear()

    for _, _, seconds, image in read_video(video):
        frames.append((seconds, image))
        if len(frames) == BATCH:
            empty()
    if frames:
        empty()
    return found


def predict_video(
    predictor: FacePredictor, video: str, smooth: float, detect_every: int | None
) -> list[list[FacePrediction]]:
    """Return the faces of each frame as in `dlfer predict`."""
    results = predict_inputs(predictor, open_inputs([video]), smooth=smooth, detect_every=detect_every)
    return [result.faces for result in results]


def compare(expected: list[list[FacePrediction]], found: list[list[FacePrediction]]) -> dict[str, object]:
    """Return the agreement of faces with the expected ones; two faces match if their boxes overlap by at least 0.5."""
    pairs, num_faces = [], 0
    for faces, others in zip(expected, found, strict=True):
        num_faces += max(len(faces), len(others))
        for face in faces:
            best = max(others, key=lambda other: compute_overlap(face.box, other.box), default=None)
            if best is not None and compute_overlap(face.box, best.box) >= 0.5:
                pairs.append((face, best))
    differences = np.array(
        [np.abs(np.subtract([*a.probabilities.values()], [*b.probabilities.values()])) for a, b in pairs]
    )
    return {
        "faces": num_faces,
        "same_face": round(len(pairs) / max(1, num_faces), 4),
        "same_label": round(sum(a.label == b.label for a, b in pairs) / max(1, num_faces), 4),
        "mean_difference": round(float(differences.mean()), 4) if pairs else None,
        "largest_difference": round(float(differences.max()), 4) if pairs else None,
        "mean_overlap": round(float(np.mean([compute_overlap(a.box, b.box) for a, b in pairs])), 4) if pairs else None,
    }


def shift(predictor: FacePredictor) -> FacePredictor:
    """Return a copy of a predictor whose boxes are shifted to the right by half a pixel."""
    moved = FacePredictor(predictor.classifier)
    detect = predictor.cropper.detect

    def detect_beside(images):
        return [
            [dataclasses.replace(face, box=(face.box[0] + 0.5, *face.box[1:])) for face in faces]
            for faces in detect(images)
        ]

    moved.cropper = Cropper(detect_beside, predictor.cropper.cut)
    return moved


def measure(predictor: FacePredictor, video: str, intervals: list[int], rounds: int, rows: list[dict]) -> None:
    """Print the speed of each variant and its agreement with the first one, with and without smoothing."""
    (about, *_), *frames = read_video(video)
    num_frames, auto = 1 + len(frames), choose_interval(None, about.rate)
    del frames
    ways = {"in_turn": partial(predict_in_turn, predictor, video)}
    ways["pipeline"] = lambda smooth: predict_video(predictor, video, smooth, 1)
    ways[f"auto ({auto})"] = lambda smooth: predict_video(predictor, video, smooth, None)
    timings = time_by_turns({name: partial(way, 0.5) for name, way in ways.items()}, rounds=rounds)
    for interval in intervals:
        ways[f"every {interval}"] = partial(predict_video, predictor, video, detect_every=interval)
    ways["shifted"] = partial(predict_video, shift(predictor), video, detect_every=1)
    expected = {smooth: predict_in_turn(predictor, video, smooth) for smooth in (0.5, 0.0)}
    for name, way in ways.items():
        row = {"way": name, "frames": num_frames, **(describe_speed(timings, name, num_frames))}
        for smooth in (0.5, 0.0):
            row[f"smooth_{smooth:g}"] = compare(expected[smooth], way(smooth))
        tell_row(row, rows)


def describe_speed(timings: dict[str, Timing], name: str, num_frames: int) -> dict[str, object]:
    """Return the speed of a variant, or {} if it was not timed."""
    if name not in timings:
        return {}
    timing = timings[name]
    return {
        "frames_per_second": round(num_frames / timing.median, 2),
        "cpu_ms_per_frame": round(1000 * timing.median_cpu / num_frames, 2),
        **describe_ratio(timing, timings["in_turn"]),
    }


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lite2_96")
    parser.add_argument("--video", metavar="FILE", help="instead of the one that is made")
    parser.add_argument("--frames", type=int, default=150, help="of the one that is made (default: 150)")
    parser.add_argument("--intervals", default="2,3,6,8", help="whose agreement is compared as well (default: 2,3,6,8)")
    add_options(parser, rounds=5)
    given = parser.parse_args()
    rows: list[dict] = []
    predictor = FacePredictor(dlfer.load(given.model))
    intervals = [int(word) for word in given.intervals.split(",") if word]
    with tempfile.TemporaryDirectory() as folder:
        video = given.video or f"{folder}/video.mp4"
        if given.video is None:
            write_video(Path(video), num_frames=given.frames)
        measure(predictor, video, intervals, given.rounds, rows)
    write_figures(given.json, rows, "onnxruntime", "opencv-python-headless", "numpy", "pillow")


if __name__ == "__main__":
    main()
