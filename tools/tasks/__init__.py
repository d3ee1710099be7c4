"""The course's tasks with right answers, a room for each; `tools.build_tasks` writes them."""
