"""The README's Python snippet runs as it stands. Its two commands are run by .ci/run."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_usage_snippet_runs(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(snippet, str(README), "exec"), {})
    assert "13 of 13 modules fused" in capsys.readouterr().out
