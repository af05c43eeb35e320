"""Findings for people: tables, pictures, and HTML pages that hold both."""
