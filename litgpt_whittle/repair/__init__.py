"""What was cut off, fitted into what stays in closed form: `litgpt extract --repair`."""
