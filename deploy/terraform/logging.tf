resource "yandex_logging_group" "cluster" {
  count = var.create_log_group ? 1 : 0

  folder_id = var.folder_id
  name      = "${var.name}-cluster"
}
