"""The performance model of tensor parallelism against gpt-fast's published figures, and the tables it prints.

python -m pytest tests/test_bench_scaling.py
"""

import pytest

from scripts.bench import scaling


@pytest.mark.parametrize("models", [["llama-2-7b"], ["llama-2-7b", "llama-2-70b"]], ids=["7B fitted", "both fitted"])
def test_the_scaling_model_is_within_15_percent_of_the_published_figures(models):
    rows = scaling.check_table(scaling.fit(models))
    assert len(rows) == 13
    for model, kind, n, published, predicted in rows:
        assert abs(predicted / published - 1) < 0.15, (model, kind, n)


def test_the_tables_are_printed(capsys):
    scaling.main()
    out = capsys.readouterr().out
    assert "| llama-2-7b | bf16 | 1 | 104.9 | 104.9 | fitted |" in out
    assert "| llama-3.1-405b | bf16 | 8 | 100.9 | does not fit | - |" in out
