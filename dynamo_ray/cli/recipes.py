"""`dynamo-ray recipes`: the catalog as a table, as Markdown or as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dynamo_ray import recipes
from dynamo_ray.errors import ConfigError, Problem


def show(folder: Path | None, *, as_json: bool, markdown: bool, into: Path | None) -> None:
    """Print it, or write its Markdown into a file.

    Raises:
        ConfigError: The catalog or a recipe is wrong, does not fit its cluster, or the file cannot be written.
    """
    if folder is None and not recipes.FOLDER.is_dir():
        raise ConfigError((Problem("--folder", "a wheel holds no recipes; give configs/ of a checkout"),))
    found = recipes.read(folder or recipes.FOLDER)
    if into is not None:
        _write(into, recipes.markdown(found))
    elif markdown:
        print(recipes.markdown(found))
    elif as_json:
        print(json.dumps(recipes.as_json(found)))
    else:
        Console(highlight=False).print(_table(found))


def _table(found: tuple[recipes.Recipe, ...]) -> Table:
    columns = ("engine", "workers x GPUs", "cluster", "routing")
    made = Table("recipe", "what", *columns, box=None, pad_edge=False, header_style="bold")
    made.columns[0].no_wrap = True
    for recipe in found:
        said = dict(zip(recipes.COLUMNS, recipes.row(recipe), strict=True))
        made.add_row(recipe.name, recipe.about.title, *(said[column] for column in columns))
    return made


def _write(into: Path, table: str) -> None:
    try:
        before = into.read_text(encoding="utf-8")
        after = recipes.inserted(before, table)
        if after != before:
            into.write_text(after, encoding="utf-8")
    except OSError as error:
        raise ConfigError((Problem("--into", str(error)),)) from error
