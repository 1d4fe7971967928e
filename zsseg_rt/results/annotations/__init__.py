"""Labels in the forms that other programs take: components, polygons, COCO, supervision."""
