"""What is particular to a task: its data, its tokenizer or image processor, its model."""
