"""What two ranks cannot time is said before any of them is there."""

import pytest

from scripts.benchmarks import benchmark_parallel


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flags", "fast balanced"], "all 2 steps would be full ones"),
        (["--flags", "FA", "--schedule", "x.json"], "no effect without fast"),
        (["--flags", "fast turbo", "fast quality"], "take one of them"),
        (["--flags", "DC", "fast turbo"], "take one of them"),
        (["--flags", "DC", "--steps", "3"], "must be a multiple of --interval 2"),
        (["--flags", "fast turbo", "--steps", "20", "--schedule", "x.json"], "cannot read x.json"),
    ],
)
def test_what_cannot_be_timed(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(benchmark_parallel, "result_of_ranks")
    with pytest.raises(SystemExit):
        benchmark_parallel.main(["--device", "cpu", *options])
    assert message in capsys.readouterr().err
