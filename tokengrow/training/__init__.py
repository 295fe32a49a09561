"""The training room: the LightningModule, its optimizer, and the Fabric loop over stages."""
