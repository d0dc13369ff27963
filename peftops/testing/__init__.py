"""What doctor, tests and bench share: inputs of every op, and the law that judges outputs."""
