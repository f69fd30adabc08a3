"""The rows a stage trains and evaluates on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ntjax.config import Config, DatasetConfig
from ntjax.data.rows import Picked, Rows, held_out, open_rows


def stage_rows(config: Config, dataset: DatasetConfig, seed: int) -> tuple[Rows | None, Rows | None]:
    """Training rows, None where they are streamed, and evaluation rows where the data set has them.

    `validation_split_ratio` holds out rows drawn with `seed`; both parts keep the order of the file.
    """
    folders = [config.path.parent, Path.cwd()]
    rows: Rows | None = None
    if dataset.streaming:
        dataset = replace(dataset, streaming=False)
    else:
        rows = open_rows(dataset, folders)
    if rows is not None and dataset.validation_split_ratio is not None:
        rows, evaluation = held_out(rows, dataset.validation_split_ratio, seed)
    elif dataset.eval_split is not None:
        evaluation = open_rows(replace(dataset, num_samples=None), folders, dataset.eval_split)
    elif dataset.eval_dataset_path is not None:
        evaluation = open_rows(
            replace(
                dataset,
                dataset_path=dataset.eval_dataset_path,
                dataset_name=None,
                dataset_split=None,
                dataset_kwargs={},
                num_samples=None,
            ),
            folders,
        )
    else:
        return rows, None
    if dataset.eval_num_samples is not None:
        evaluation = Picked(evaluation, range(min(len(evaluation), dataset.eval_num_samples)))
    return rows, evaluation
