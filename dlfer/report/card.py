"""The model card of a run (MODEL_CARD.md): intended use, limits, training data with its terms, and metrics.

The terms are known only for data that the experiment names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import DataConfig
from dlfer.errors import ModelError
from dlfer.model.vggface2 import TERMS
from dlfer.report.figures import MAX_LABELS
from dlfer.report.headline import (
    METRICS,
    SPLITS,
    VIEWS,
    build_metrics_table,
    describe_duplicate_sources,
    describe_duplicates,
    describe_not_judged,
)
from dlfer.report.judgement import describe_abstention, describe_calibration, describe_groups, describe_missing_groups
from dlfer.report.page import (
    describe_environment,
    format_count,
    format_fraction,
    format_interval,
    format_percent,
    format_uncertainty,
    get_name,
    read_experiment,
    render_text,
)
from dlfer.runs.files import write_atomically
from dlfer.runs.metrics_record import Estimate, Metrics, is_missing
from dlfer.runs.records import ArtifactRecord, DataRecord, RunRecord, WeightsOrigin
from dlfer.runs.run_records import read_metrics

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


class Terms(NamedTuple):
    """The terms of use of one data source, as far as known.

    Attributes:
        data: the source, and what it was used for.
        text: the terms, in sentences.
        research_only: whether weights trained on it are for research only.
    """

    data: str
    text: str
    research_only: bool


_FER2013 = (
    "The licence of the images is unclear. They are for research use; do not redistribute them. Weights trained on them "
    "are marked for research only."
)
_IMAGENET = (
    "The images are for non-commercial research and education. Weights trained on them are marked for research only."
)
_SYNTHETIC = "Drawn by dlfer, without images of persons; only dlfer's own terms (Apache-2.0) apply."
_OWN = "The user's own data; dlfer does not know its terms."
_EARLIER = "Weights of an earlier run or file: the terms of the data that they were trained on apply here, too."


def find_terms(config: ExperimentConfig | None, origins: Sequence[WeightsOrigin] = ()) -> list[Terms]:
    """Return the sources that a model learned from, with their terms.

    Args:
        config: the model's experiment; None if it is unknown.
        origins: the published weights that the model's artifact lists.
    """
    found = [_judge_origin(origin) for origin in origins]
    if config is None:
        return found
    pretrain = config.pretrain
    weights = () if pretrain is None else pretrain.list_of_weights
    for source in weights:
        if source == "imagenet":
            found.append(Terms("ImageNet (published weights, EF-FER1)", _IMAGENET, True))
        elif source == "vggface2":
            if not any(origin.name == source for origin in origins):
                found.append(Terms("VGGFace2 (published weights, EF-FER1)", TERMS, True))
        else:
            found.append(_judge_path(f"{source} (EF-FER1)", source, _EARLIER))
    if pretrain is not None and not weights and pretrain.data is not None:
        found.append(_judge_data(pretrain.data, "EF-FER1"))
    found.append(_judge_data(config.finetune.data, "EF-FER2"))
    return found


def _judge_origin(origin: WeightsOrigin) -> Terms:
    files = ", ".join(f"{name} (sha256 {digest})" for name, digest in origin.sha256.items())
    return Terms(f"{origin.source} ({origin.role})", f"{origin.terms} Files: {files}.", origin.research_only)


def _judge_data(data: DataConfig, title: str) -> Terms:
    if data.source == "fer2013":
        return Terms(f"FER2013 ({title})", _FER2013, True)
    if data.source.startswith("synthetic"):
        return Terms(f"{data.source} ({title})", _SYNTHETIC, False)
    where = data.name or data.path or ""
    return _judge_path(f"{data.source} {where} ({title})".replace("  ", " "), where, _OWN)


def _judge_path(data: str, where: str, otherwise: str) -> Terms:
    """Return the terms of a file or folder, which is taken for FER2013 or ImageNet if its path contains that name."""
    plain = where.casefold().replace("-", "").replace("_", "")
    if "fer2013" in plain:
        return Terms(data, _FER2013, True)
    if "imagenet" in plain:
        return Terms(data, _IMAGENET, True)
    return Terms(data, otherwise, False)


CARD_FILE = "MODEL_CARD.md"

# Metric -> its identifier on the Hugging Face hub.
_HUB_METRICS = {
    "accuracy": "accuracy",
    "macro F1": "f1",
    "macro precision": "precision",
    "balanced accuracy": "balanced_accuracy",
    "macro AUC": "roc_auc",
    "MCC": "matthews_correlation",
    "ECE": "expected_calibration_error",
    "Brier score": "brier_score",
}


def write_card(run_path: Path) -> Path:
    """Write the model card of a run beside its model, as model/MODEL_CARD.md; return its path.

    The file starts with the metadata that model hubs read, so it can be published as a hub's README.md.

    Args:
        run_path: a run directory that has a model. The card leaves out what its files do not contain.

    Raises:
        ModelError: the folder has no model, or one of its files is damaged.
        ConfigError: the config.yaml is not a valid experiment.
    """
    path = Path(run_path) / "model" / CARD_FILE
    write_atomically(path, compose_card(run_path))
    return path


def compose_card(run_path: Path) -> str:
    """Return the text of the model card of a run; see `write_card`."""
    from huggingface_hub import ModelCard, ModelCardData

    run_path = Path(run_path)
    artifact = ArtifactRecord.read(run_path / "model")
    if artifact is None:
        raise ModelError(
            f"{run_path}: found no model/{ArtifactRecord.FILE}; a card is written for a run that has a model."
        )
    run, data = RunRecord.read(run_path) or RunRecord(), DataRecord.read(run_path) or DataRecord()
    metrics, config = read_metrics(run_path) or Metrics(), read_experiment(run_path)
    terms = find_terms(config, artifact.about.origins)
    research_only = any(term.research_only for term in terms)
    calibration = describe_calibration(metrics)
    # An int8 file with its own temperature and threshold was judged at them on validation alone.
    is_refitted = artifact.onnx is not None and artifact.onnx.temperature is not None
    judged = metrics.model_copy(update={"test": None}) if is_refitted else metrics
    context = {
        "name": get_name(run_path, run),
        "run_name": run_path.resolve().name,
        "artifact": artifact,
        "network": " with ".join(_list_backbones(config)) or artifact.family,
        "banner": metrics.banner,
        "warnings": run.warnings,
        "research_only": research_only,
        "terms": terms,
        "protocol": _describe_protocol(metrics, data),
        "table": _build_table(metrics),
        "calibration": [*(calibration.notes if calibration else []), *describe_abstention(judged)],
        "limits": _list_limits(metrics, data),
        "environment": describe_environment(run),
    }
    metadata = ModelCardData(
        language=None,
        license="other" if research_only else "unknown",
        license_name="research-only" if research_only else None,
        library_name="dlfer",  # tells the hub how the model is loaded
        pipeline_tag="image-classification",
        tags=_list_tags(config, metrics, research_only=research_only),
        metrics=["accuracy", "f1"],
        model_name=get_name(run_path, run),
        eval_results=list(_list_results(metrics, data, config)) or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_str="---\n{{ card_data }}\n---\n\n{{ body }}",
        body=render_text("card.md.j2", context),
    )
    return str(card).rstrip() + "\n"


def _list_backbones(config: ExperimentConfig | None) -> list[str]:
    """Return the backbone of an experiment, the branches of a hybrid, or the names of an ensemble's members."""
    if config is None:
        return []
    if config.ensemble is not None:
        return [member.name for member in config.ensemble.members]
    return list(config.model.branches) or [config.model.backbone]


def _list_tags(config: ExperimentConfig | None, metrics: Metrics, *, research_only: bool) -> list[str]:
    tags = ["facial-expression-recognition", "dlfer", "keras", f"protocol-{metrics.protocol or 'unknown'}"]
    tags += [backbone.replace("_", "-") for backbone in _list_backbones(config)]
    if not metrics.is_clean:
        tags.append("not-a-clean-test")
    return [*tags, "research-only"] if research_only else tags


def _list_results(metrics: Metrics, data: DataRecord, config: ExperimentConfig | None) -> Iterator[EvalResult]:
    """Yield the metrics as metadata for the hub: of test, else validation, each with and without duplicates.

    The name of the data set says whether validation selected the model, and whether the test is not clean.
    """
    from huggingface_hub import EvalResult

    name = metrics.judged_split
    source = data.source or (config.finetune.data.source if config is not None else "unknown")
    split = (data.splits[name].name if name in data.splits else None) or name
    use = "used for selection" if metrics.is_selected else "used for calibration"
    what = f"{source} {split}" + (f" (validation, {use})" if name == "validation" else "")
    remark = "" if metrics.is_clean else " (not a clean test)"
    left_out = f", images without a duplicate in {describe_duplicate_sources(metrics.duplicates)}"
    for found, suffix, words in (
        (metrics.judged, "", remark),
        (metrics.judged_without_duplicates, "-without-duplicates", left_out),
    ):
        for metric in METRICS if found is not None else ():
            estimate = metric.get(found)
            if metric.name not in _HUB_METRICS or estimate is None or is_missing(estimate.value):
                continue
            interval = format_interval(estimate, "fraction")
            n = f"95 % {interval}, n = {found.n}" if interval else f"n = {found.n}"
            yield EvalResult(
                task_type="image-classification",
                task_name="Facial expression recognition",
                dataset_type=source,
                dataset_name=f"{what}{words}",
                dataset_config=f"{metrics.protocol}{suffix}",
                dataset_split=split,
                metric_type=_HUB_METRICS[metric.name],
                metric_name=f"{metric.name} ({n})",
                metric_value=round(float(estimate.value), 6),
            )


class CardTable(NamedTuple):
    """A table of metrics as text: column names, and rows that start with the name of the metric."""

    columns: list[str]
    rows: list[list[str]]


def _build_table(metrics: Metrics) -> CardTable:
    """Return the table of the recorded metrics of all splits but train."""
    table = build_metrics_table(metrics, [split for split in SPLITS if split != "train"])
    columns = [f"{column.name}, n = {format_count(column.n)}" for column in table.columns]
    rows = []
    for row in table.rows:
        name = f"{row.name} ({row.remark})" if row.remark else row.name
        rows.append([name, *(_format_cell(cell, row.scale) for cell in row.cells)])
    return CardTable(columns, rows)


def _format_cell(cell: Estimate | None, scale: str) -> str:
    if cell is None:
        return "–"
    interval = format_interval(cell, scale) or (format_uncertainty(cell) if cell.reason else "")
    text = format_percent(cell.value) if scale == "percent" else format_fraction(cell.value)
    return text + (f" ({interval})" if interval else "")


def _describe_protocol(metrics: Metrics, data: DataRecord) -> list[str]:
    if metrics.judged is None:
        return ["The model was not evaluated."]
    splits = ", ".join(f"{name} {format_count(split.n)} ({split.name or name})" for name, split in data.splits.items())
    lines = [
        f"Protocol `{metrics.protocol}`, selected on {metrics.describe_selection()}"
        + (f"; {splits}." if splits else ".")
    ]
    if metrics.judged_split == "validation":
        why = ". The validation values below are optimistic, because the same images selected the model."
        lines.append(f"There is no test split{why if metrics.is_selected else '.'}")
    duplicates = describe_duplicates(metrics)
    if duplicates:
        lines.append(duplicates)
    if metrics.headline != "single":
        view = VIEWS.get(metrics.headline, metrics.headline)
        lines.append(
            f"The run's headline averages over {view}; the values below are for single images without averaging."
        )
    if metrics.test_opened and metrics.test is not None:
        opened = "once" if metrics.test_opened == 1 else f"{metrics.test_opened} times"
        lines.append(f"The test split was opened {opened}.")
    return lines


def _list_limits(metrics: Metrics, data: DataRecord) -> list[str]:
    """Return the weak points that the model's metrics show, as sentences."""
    if metrics.judged is None:
        return []
    lines, per_class = [], metrics.judged.per_class
    recalls = {label: row.get("recall") for label, row in per_class.items() if not is_missing(row.recall)}
    if recalls and len(per_class) <= MAX_LABELS:
        worst = min(recalls, key=lambda label: recalls[label].value)
        lines.append(
            f"Its lowest recall is that of {worst}: {format_percent(recalls[worst].value)} of "
            f"{format_count(per_class[worst].n)} images ({format_uncertainty(recalls[worst])})."
        )
    if absent := describe_not_judged(metrics.judged):
        lines.append(f"{absent[0].upper()}{absent[1:]}.")
    gaps = [f"By {table.name}: {' '.join(table.notes)}" for table in describe_groups(metrics) if table.notes]
    return lines + (gaps or [describe_missing_groups(data.source)])
