"""The `dlfer explain` command: show which regions of a face a trained model's predictions depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlfer.cli.options import DetectorSize, Faces, Force, Model, print_text, say
from dlfer.errors import UserError


def explain(
    context: typer.Context,
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE", help="Pictures, folders, globs; none with --split.", show_default=False),
    ] = None,
    model: Model = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Split of a run's data, test or validation: average maps over each label."),
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="METHOD", help="Method of the maps: occlusion, gradcam or both.")
    ] = "both",
    label: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Label that the maps explain; by default each face's most probable label."),
    ] = None,
    faces: Faces = "auto",
    detector_size: DetectorSize = None,
    size: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Side of the occluding square; by default a sixth of the face.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Step of the occluding square; by default half its side.")
    ] = None,
    feature_level: Annotated[
        str,
        typer.Option(
            metavar="auto|last|N",
            help="Feature level of the backbone for Grad-CAM: auto is the deepest with at least 7 x 7 cells; earlier ones "
            "(1, 2, ...) are finer.",
        ),
    ] = "auto",
    per_class: Annotated[int, typer.Option(metavar="N", help="With --split: at most N faces of each label.")] = 40,
    sanity: Annotated[
        bool, typer.Option("--sanity", help="Check that the maps change when the weights are re-initialised.")
    ] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output folder.")] = Path("explained"),
    force: Force = False,
) -> None:
    """Show which regions of a face a prediction depends on: figures, arrays (.npz) and a page.

    A map shows what the model reacts to. It does not show what a person feels, nor that the model is right.
    Inputs that cannot be read or explained are listed at the end, and the command exits with 1.
    """
    methods = ("occlusion", "gradcam") if method == "both" else (method,)
    if method not in ("occlusion", "gradcam", "both"):
        raise UserError(f"--method {method}: expected occlusion, gradcam or both.")
    if (split is None) != bool(images):
        raise UserError("dlfer explain: give either IMAGE... or --split test|validation.")
    from dlfer.data.given import parse_split

    split = parse_split(split, ("test", "validation"))
    if split is not None and model is None:
        raise UserError("dlfer explain: --split needs --model RUN, a run whose data is still available.")
    if split is not None and label is not None:
        raise UserError(
            "dlfer explain: --label goes with IMAGE...; over a split the maps are of each face's own label."
        )
    if per_class < 1:
        raise UserError(f"--per-class {per_class}: expected 1 or more.")
    _refuse_unused(context, is_split=split is not None, methods=methods)
    if model is not None:
        from dlfer.runs.find import find_model

        find_model(model)  # report a wrong name before TensorFlow is loaded
    from dlfer.runs.files import check_writable

    check_writable(out, "--out")

    from dlfer.explain.explanation import MapOptions
    from dlfer.explain.jobs import ExplainJob, explain_pictures

    job = ExplainJob(
        model=model,
        out=out,
        maps=MapOptions(methods=methods, size=size, stride=stride, feature_level=feature_level),
        label=label,
        faces=faces,
        detector_size=detector_size,
        per_class=per_class,
        check=sanity,
        force=force,
    )
    if split is not None:
        from dlfer.explain.jobs import explain_split

        print_text(explain_split(split, job, say=say))
        return
    page, num_failed = explain_pictures(images or [], job, say=say)
    print_text(page)
    if num_failed:
        raise typer.Exit(1)


def _refuse_unused(context: typer.Context, *, is_split: bool, methods: tuple[str, ...]) -> None:
    """Raise UserError if an option is given that would have no effect."""
    unused = {
        "faces": "does not go with --split: faces of a split are found as in the run's data; leave it out"
        if is_split
        else None,
        "detector_size": "does not go with --split: faces of a split are found as in the run's data; leave it out"
        if is_split
        else None,
        "per_class": None if is_split else "goes with --split",
        "size": None if "occlusion" in methods else "goes with --method occlusion or both",
        "stride": None if "occlusion" in methods else "goes with --method occlusion or both",
        "feature_level": None if "gradcam" in methods else "goes with --method gradcam or both",
    }
    for name, reason in unused.items():
        source = context.get_parameter_source(name)
        if reason is not None and source is not None and source.name == "COMMANDLINE":
            raise UserError(f"dlfer explain: --{name.replace('_', '-')} {reason}.")
