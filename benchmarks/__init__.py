"""What was measured and how: a module measures one thing, writes ``results/NAME.json``; `render` fills README.md."""
