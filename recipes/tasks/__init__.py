"""What is particular to a task: its data, its tokeniser or image processor, its model."""
