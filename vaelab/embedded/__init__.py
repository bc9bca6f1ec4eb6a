"""The shipped models, how they were trained, and how well they draw."""
