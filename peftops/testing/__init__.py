"""What doctor, the tests and bench share: named inputs of every op, and the law that judges its outputs."""
