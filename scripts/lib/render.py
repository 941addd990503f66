"""A table for eyes: rounded, in pieces, on a terminal and as Markdown."""

import io
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence

from lib.program import count, need
from lib.results import canon
from lib.sequential import Rule
from lib.tables import Line, Table

NUMBER = re.compile(r"[-+\[]?[\d.]|-$|n=1$|no spread$|(no )?baseline$")
MEANS = ("n", "final_loss", "sd", "train_time", "ms/step", "MiB")


VERSUS = ("diff", "rel", "95% CI", "p", "Holm p", "test", "decision", "can see", "flags")


COSTS = ("step time", "peak memory", "equal steps", "equal time", "equal time by")


TARGET = ("reached", "steps", "time", "steps vs", "time vs")


PIECES = {
    "": MEANS,
    "against the baseline": VERSUS,
    "time and memory": COSTS,
    "to the target loss": TARGET,
}


def cells_of(table: Table, most: int | None = None) -> list[dict[str, str]]:
    """The table for eyes: one dict per line (at `most` so many), rounded. The knobs that all
    cells share are left out of the notes."""
    common = shared_notes(table)
    parts = (mean_cells, versus_cells, cost_cells, target_cells)
    shown = []
    for line in table.lines[:most]:
        row = key_cells(line, common)
        for part in parts:
            row |= part(line)
        shown.append(row)
    return shown


def key_cells(line: Line, common: Sequence[str]) -> dict[str, str]:
    """What names the cell; of its notes only the words that are not `common`."""
    key = {k: v or ("?" if k != "notes" else "-") for k, v in line.cell.key.items()}
    if key.get("notes"):
        key["notes"] = " ".join(w for w in key["notes"].split() if w not in common) or "-"
    return key


def mean_cells(line: Line) -> dict[str, str]:
    n = line.numbers
    return {
        "n": f"{n['seeds']}{'*' * (n['duplicate_rows'] > 0)}",
        "final_loss": rounded(n, "final_loss", "{:.4f}"),
        "sd": rounded(n, "sd", "{:.5f}") if n["seeds"] > 1 else "n=1",
        "train_time": str(n["train_time"]),
        "ms/step": rounded(n, "ms_per_step", "{:.2f}"),
        "MiB": rounded(n, "peak_memory_mib", "{:.0f}"),
    }


def versus_cells(line: Line) -> dict[str, str]:
    """The final loss against the baseline's."""
    n, c = line.numbers, line.comparison
    diff = "baseline" if line.is_baseline else "no baseline"
    interval = test = decision = "-"
    if c:
        diff = rounded(n, "diff", "{:+.4f}")
        interval = span(n, "", "{:+.4f}") if c.chosen else c.test
        test = c.test if c.chosen else "-"
        decision = c.decision or "-"
    return {
        "diff": diff,
        "rel": rounded(n, "rel_pct", "{:+.2f}%"),
        "95% CI": interval,
        "p": rounded(n, "p", "{:.2g}"),
        "Holm p": rounded(n, "p_holm", "{:.2g}"),
        "decision": decision,
        "test": test,
        "can see": rounded(n, "least_diff", "{:.4f}"),
        "flags": str(n["flags"]) or "-",
    }


def cost_cells(line: Line) -> dict[str, str]:
    """Step time and memory against the baseline's, and loss at equal steps and at equal time."""
    n, c = line.numbers, line.comparison
    # after as many steps as both have, the final losses are the answer, and stand under diff
    other_steps = c and c.equal_steps.how != "final losses"
    return {
        "step time": with_span(n, "overhead", "_pct", "{:+.1f}", "%"),
        "peak memory": rounded(n, "memory_pct", "{:+.1f}%"),
        "equal steps": with_span(n, "equal_steps", "_diff", "{:+.4f}") if other_steps else "-",
        "equal time": with_span(n, "equal_time", "_diff", "{:+.4f}"),
        "equal time by": str(n["equal_time_how"]) or "-",
    }


def target_cells(line: Line) -> dict[str, str]:
    """Steps and time to the target loss, and both against the baseline's."""
    n = line.numbers
    told = math.isfinite(line.target) or n["reached"]
    return {
        "reached": f"{n['reached']} of {n['seeds']}" if told else "-",
        "steps": rounded(n, "steps_to_target", "{:.0f}"),
        "time": rounded(n, "seconds_to_target", "{:.1f} s"),
        "steps vs": with_span(n, "steps_to_target", "_pct", "{:+.1f}", "%"),
        "time vs": with_span(n, "seconds_to_target", "_pct", "{:+.1f}", "%"),
    }


def span(numbers: Mapping[str, object], name: str, form: str) -> str:
    """The interval whose ends are called `name`ci_lo and `name`ci_hi."""
    ends = (form.format(numbers[f"{name}ci_{end}"]) for end in ("lo", "hi"))
    return f"[{', '.join(ends)}]"


def with_span(
    numbers: Mapping[str, object], name: str, suffix: str, form: str, unit: str = ""
) -> str:
    """A number and, where it is known, its interval."""
    text = rounded(numbers, name + suffix, form + unit)
    if numbers[f"{name}_ci_lo"] == "":
        return text
    return f"{text} {span(numbers, f'{name}_', form)}"


def rounded(numbers: Mapping[str, object], name: str, form: str) -> str:
    return "-" if numbers[name] == "" else form.format(numbers[name])


def shared_notes(table: Table) -> list[str]:
    notes = [line.cell.key.get("notes", "").split() for line in table.lines]
    return [w for w in notes[0] if all(w in other for other in notes)] if len(notes) > 1 else []


def pieces_of(
    shown: Sequence[Mapping[str, str]], table: Table
) -> list[tuple[str, list[str], list[Mapping[str, str]]]]:
    """Title, columns and lines of each piece of the table. What no line knows is left out."""
    out = []
    compared = [line.comparison for line in table.lines if line.comparison]
    num_tested = sum(1 for c in compared if c.chosen and not c.anytime)
    always = {
        "test",
        *(["p"] if num_tested else []),
        "sd",
        "ms/step",
        *(["Holm p"] if num_tested > 1 else []),
    }
    for title, columns in PIECES.items():
        rows = [
            row
            for row, x in zip(shown, table.lines, strict=False)
            if x.comparison or columns in (MEANS, TARGET)
        ]
        known = {c for c in columns if c != "Holm p" and any(row[c] != "-" for row in rows)}
        if known and rows:
            out.append((title, [c for c in columns if c in known | always], rows))
    return out


def sequential_legend(rule: Rule) -> str:
    """What the decisions and intervals of a sequential stage mean."""
    level = f"{100 - 100 * rule.alpha / rule.num_comparisons:g}%"
    return (
        "sequential: seeds were added until each comparison was decided, so that no plain p "
        "holds; "
        f"CI: {level}, valid after every seed; better and worse are wrong in at most "
        f"{100 * rule.alpha:g}% of such stages, not better by delta ({rule.delta:g} nats) in at "
        "most "
        f"{100 - 100 * rule.power:g}% of cells that are better by it"
    )


def legend_of(table: Table) -> list[str]:
    """What the columns mean, the remarks, and the knobs left out."""
    compared = [line.comparison for line in table.lines if line.comparison]
    num_tested = sum(1 for c in compared if c.chosen and not c.anytime)
    out = []
    if compared:
        words = (
            f"final_loss in {table.loss_unit}, mean over n seeds; diff, rel and CI: against the "
        )
        words += "baseline, below 0 is better"
        if num_tested:
            words += "; paired t where both ran the same seeds, Welch's t otherwise"
        if num_tested > 1:
            words += f"; Holm over {num_tested} comparisons"
        if num_tested:
            words += "; can see: the smallest difference that this n and spread show 4 times in 5"
        words_of_ratios = "step time, and steps and time to a target: ratios of means, [95% CI] by "
        out += [words, words_of_ratios + "Welch's t on logarithms"]
    if table.stage.sequential and compared:
        out.append(sequential_legend(table.stage.sequential))
    if any(c.equal_time.how.startswith("interpolated") for c in compared):
        words = (
            "equal time, interpolated, un-annealed: the slower arm's curve where the faster arm "
        )
        words += "ends, its rate not yet down; only runs with TIME_BUDGET_S show who wins"
        out.append(words)
    if any(line.numbers["reached"] for line in table.lines):
        targets = {line.target for line in table.lines}
        by = (
            "on straight lines between validations"
            if math.isfinite(min(targets))
            else "the first validation there"
        )
        out.append(
            f"target loss {', '.join(canon(t) for t in targets)}: {by}".replace(
                "loss nan", "loss of each run"
            )
        )
    if common := shared_notes(table):
        out.append(f"all cells: {' '.join(common)}")
    return out + list(table.notes) + list(table.remarks)


# A line of dashes under the header, and spaces everywhere else.
RULED = "    \n    \n -- \n    \n    \n    \n    \n    \n"


def grid(
    rows: Sequence[Mapping[str, str]], columns: Sequence[str], width: int, fold: bool = False
) -> list[str] | None:
    """An aligned table of at most `width` columns, numbers to the right and words to the left;
    words are wrapped where they must be, and so are intervals where `fold` says so. None where
    it does not fit."""
    text = need("rich.text", "a table").Text  # nothing in it is markup
    box = need("rich.box", "a table").Box(RULED, ascii=True)
    rich_table = need("rich.table", "a table").Table(
        box=box, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    least_width = -2
    for name in columns:
        cells = [name, *(row[name] for row in rows)]
        longest = max(map(len, cells))
        is_number = all(NUMBER.match(cell) for cell in cells[1:])
        if is_number and fold:
            least = max(len(word) for cell in cells for word in cell.split() or [""])
        elif is_number:
            least = longest
        else:
            least = min(longest, 18)
        least_width += least + 2
        justify = "right" if is_number else "left"
        rich_table.add_column(text(name), justify=justify, min_width=least, overflow="fold")
    if least_width > width:
        return None
    for row in rows:
        rich_table.add_row(*(text(row[name]) for name in columns))
    console = need("rich.console", "a table").Console(
        width=width, file=io.StringIO(), color_system=None, legacy_windows=False
    )
    console.print(rich_table)
    return [line.rstrip() for line in console.file.getvalue().rstrip().split("\n")]


def terminal_width() -> int:
    """Columns of the terminal; 110 where there is none, as in a file or a pipe."""
    return shutil.get_terminal_size((110, 24)).columns if sys.stdout.isatty() else 110


def table_text(table: Table, width: int = 110, most: int = 500) -> str:
    """The table for a terminal of `width` characters, in pieces: means, comparisons, costs, the
    target loss. Cells whose keys do not fit are numbered, with a list of what they are. No more
    than `most` cells."""
    heading = f"{table.stage.name}: {count(table.num_rows, 'row')}, {table.num_finished} counted, "
    out = [heading + count(len(table.lines), "cell")]
    numbered = [{"cell": str(i), **row} for i, row in enumerate(cells_of(table, most), start=1)]
    pieces = pieces_of(numbered, table)

    def fitting(keys: Sequence[str]) -> list[str] | None:
        """All pieces; None where one does not fit."""
        lines: list[str] = []
        for title, columns, rows in pieces:
            found = grid(rows, [*keys, *columns], width)
            if not found and keys == ["cell"]:
                found = grid(rows, [*keys, *columns], width, fold=True)
            if not found:
                return None
            if title:
                lines += ["", title]
            lines += found
        return lines

    if numbered:
        lines = fitting(table.keys)
        if lines is None:
            out += [
                line
                for i, row in enumerate(numbered, start=1)
                for line in _legend(i, row, table.keys, width)
            ]
            lines = fitting(["cell"])
        out += lines or []
    if len(table.lines) > most:
        out.append(
            f"  {count(len(table.lines) - most, 'further cell')}: in the table's .csv and .md"
        )
    for note in legend_of(table):
        out += textwrap.wrap(
            note, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
    return "\n".join(out)


def _legend(number: int, row: Mapping[str, str], keys: Sequence[str], width: int) -> list[str]:
    text = f"cell {number}: " + " ".join(row[k] if k == "notes" else f"{k}={row[k]}" for k in keys)
    return textwrap.wrap(text, width, subsequent_indent="    ", break_on_hyphens=False)


def table_md(table: Table, sources: Sequence[str]) -> str:
    """The table as Markdown, in one piece."""
    rows = cells_of(table)
    columns = table.keys + [c for _, shown, _ in pieces_of(rows, table) for c in shown]
    words = {*table.keys, "test", "flags", "equal time by"}
    out = [f"# {table.stage.name}", ""]
    counts = f"{count(table.num_rows, 'row')}, {table.num_finished} counted, "
    counts += count(len(table.lines), "cell")
    out += [f"Made by `scripts/split_results.py` from {', '.join(sources)}: {counts}.", ""]
    if rows:
        out.append("| " + " | ".join(columns) + " |")
        out.append("| " + " | ".join("---" if c in words else "---:" for c in columns) + " |")
        out += [
            "| " + " | ".join(row[c].replace("|", "\\|") for c in columns) + " |" for row in rows
        ]
        out.append("")
    out += [f"- {note.replace('*', chr(92) + '*')}" for note in legend_of(table)]
    return "\n".join(out).rstrip() + "\n"
