"""The screen of ``pyvmm top``."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Static

from pyvmm.cli.top_watch import COLUMNS, Seen, Watch, most, row

REFRESH = 0.25
SORTS = ("NAME", "CPU %", "EXITS/S", "WRITTEN/S")


class TopApp(App[None]):
    """A table of machines, and below it one of them closer."""

    TITLE = "pyvmm top"
    CSS = "DataTable { height: 1fr; } #closer { height: auto; max-height: 60%; padding: 1 1 0 1; }"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"), Binding("s", "sort", "Sort"), Binding("escape", "away", "Table only"),
    ]  # fmt: skip

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch
        self._sort = 0
        self._closer: str | None = None
        self._seen: list[Seen] = []

    def compose(self) -> ComposeResult:
        """The table, what is closer, the keys."""
        yield DataTable(cursor_type="row", zebra_stripes=False)
        yield Static("", id="closer")
        yield Footer()

    def on_mount(self) -> None:
        """Begin."""
        table = self.query_one(DataTable)
        table.add_columns(*COLUMNS)
        table.focus()
        self._refresh()
        self.set_interval(REFRESH, self._refresh)

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Enter."""
        self._closer = event.row_key.value
        self._refresh()

    def action_away(self) -> None:
        """Escape."""
        self._closer = None
        self._refresh()

    def action_sort(self) -> None:
        """By the next column."""
        self._sort = (self._sort + 1) % len(SORTS)
        self._refresh()

    def _refresh(self) -> None:
        self._seen = sorted(self._watch.look(), key=self._key)
        table = self.query_one(DataTable)
        there = [str(key.value) for key in table.rows]
        wanted = [each.name for each in self._seen]
        if there != wanted:
            at = table.cursor_row
            chosen = there[at] if 0 <= at < len(there) else None
            table.clear()
            for each in self._seen:
                table.add_row(*_cells(each), key=each.name)
            if chosen in wanted:
                table.move_cursor(row=wanted.index(chosen))
        else:
            for number, each in enumerate(self._seen):
                for column, cell in enumerate(_cells(each)):
                    table.update_cell_at((number, column), cell, update_width=True)  # type: ignore[arg-type]
        self.query_one("#closer", Static).update(Text("\n".join(self._lines())))

    def _key(self, seen: Seen) -> tuple[float, str]:
        rate = seen.rates
        column = SORTS[self._sort]
        if rate is None or column == "NAME":
            return 0.0, seen.name
        value = {"CPU %": rate.busy, "EXITS/S": rate.exits, "WRITTEN/S": rate.dirty or 0.0}[column]
        return -value, seen.name

    def _lines(self) -> list[str]:
        if self._watch.problem is not None:
            return [self._watch.problem]
        if not self._seen:
            return ["no machine is running"]
        seen = next((each for each in self._seen if each.name == self._closer), None)
        return closer(seen) if seen is not None else [f"sorted by {SORTS[self._sort]}; Enter shows a machine closer"]


def _cells(seen: Seen) -> list[Text]:
    """Plain text: what a machine says is no markup."""
    return [Text(cell) for cell in row(seen)]


def closer(seen: Seen) -> list[str]:
    """Lines about one machine."""
    lines = [f"{seen.name}: {seen.problem or (seen.sample.status if seen.sample else '...')}"]
    one, rate = seen.sample, seen.rates
    if one is None:
        return lines
    for cpu in rate.cpus if rate else ():
        lines.append(f"vCPU {cpu.index}: {100 * cpu.busy:.1f} % of a CPU, {cpu.exits:.0f} exits/s")
    if kinds := most(rate):
        lines.append("exits/s by kind: " + ", ".join(f"{kind} {count:.0f}" for kind, count in kinds))
    for queue in one.queues:
        depth = "busy" if queue.depth is None else queue.depth
        lines.append(f"{queue.device} queue {queue.queue}: {depth} of {queue.size}")
    if one.migration is not None:
        lines.append(f"migration: {one.migration['status']}")
    if one.colo is not None and one.colo_stats is not None and one.colo["mode"] != "none":
        stats = one.colo_stats
        lines.append(f"COLO: {one.colo['mode']}, pair {one.colo['x-pair']}, term {one.colo['x-term']}, epoch"
                     f" {one.colo['x-epoch']}")  # fmt: skip
        if stats["checkpoints"]:
            lines.append(f"checkpoints: {stats['checkpoints']}, the last {stats['pages']} pages")
        if (pause := stats.get("pause")) is not None:
            lines.append(f"pause: median {pause['median']:.2f} ms, longest {pause['largest']:.2f} ms")
    return lines
