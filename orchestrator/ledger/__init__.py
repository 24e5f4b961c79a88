"""What is known of a study: its ledger, and what is read from it without starting anything."""

from orchestrator.ledger.ledger import Ledger, LedgerError, LedgerWarning, Snapshot, attempt_row, parquet_bytes

__all__ = ["Ledger", "LedgerError", "LedgerWarning", "Snapshot", "attempt_row", "parquet_bytes"]
