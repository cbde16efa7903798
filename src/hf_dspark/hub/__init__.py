"""Where files come from: names of models (`names`), the bundled models (`bundled`), folders and the Hub (`files`). Imports: utils."""
