"""Run a notebook's code and write its outputs into it; Jupyter is not needed.

    python docs/run_notebook.py docs/guides/evaluate_encoder.ipynb

All cells run one after another in this process, in a temporary folder. What a cell prints becomes its output, and so does
the value of its last line: a picture as PNG, anything else as text. Magics (%) and shell commands (!) are not understood.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def run(cells: list[dict[str, Any]]) -> None:
    """Run the code cells, writing outputs and execution counts into them."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate((cell for cell in cells if cell["cell_type"] == "code"), 1):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"<cell {number}>", "exec"), names)
            value = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), names) if last else None
        outputs: list[dict[str, Any]] = []
        if printed.getvalue():
            outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)})
        if value is not None:
            outputs.append(
                {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": shown(value)}
            )
        cell["execution_count"], cell["outputs"] = number, outputs


def shown(value: Any) -> dict[str, Any]:
    """A value as Jupyter shows it."""
    data: dict[str, Any] = {"text/plain": ["<picture>" if hasattr(value, "_repr_png_") else repr(value)]}
    if hasattr(value, "_repr_png_"):
        data["image/png"] = base64.b64encode(value._repr_png_()).decode() + "\n"
    return data


def main(path: Path) -> None:
    """Run the notebook at `path` and write it back."""
    notebook = json.loads(path.read_text())
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            run(notebook["cells"])
        finally:
            os.chdir(before)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
