"""Room 2: neural modules that know no model, no file and no engine."""
