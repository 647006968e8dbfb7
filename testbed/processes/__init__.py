"""Who runs the steps of cells: this process, or a child for each backend; and what ends a child."""
