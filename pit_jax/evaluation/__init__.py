"""Who wins, by how much and how sure: win rates, agreement of reward models, tables (PIT section 4, appendix G)."""
