data "yandex_compute_image" "ubuntu" {
  count = var.create_vm ? 1 : 0

  family = "ubuntu-2404-lts"
}

# A subnet of its own: a public address works only where no route leads to the NAT gateway.
resource "yandex_vpc_subnet" "vm" {
  count = var.create_vm ? 1 : 0

  folder_id      = var.folder_id
  name           = "${var.name}-vm"
  zone           = var.zone
  network_id     = yandex_vpc_network.this.id
  route_table_id = var.vm_public_ip ? null : yandex_vpc_route_table.nat.id
  v4_cidr_blocks = [cidrsubnet(var.network_cidr, 1, 1)]
}

# The user interfaces listen on loopback; they are reached through an SSH tunnel.
resource "yandex_vpc_security_group" "vm" {
  count = var.create_vm ? 1 : 0

  folder_id   = var.folder_id
  name        = "${var.name}-vm"
  description = "Dagster, MLflow and PostgreSQL."
  network_id  = yandex_vpc_network.this.id

  dynamic "ingress" {
    for_each = length(var.vm_ssh_cidr_blocks) > 0 ? [var.vm_ssh_cidr_blocks] : []

    content {
      description    = "SSH"
      protocol       = "TCP"
      v4_cidr_blocks = ingress.value
      port           = 22
    }
  }

  egress {
    description    = "The cloud's services, packages, container images, name and time servers"
    protocol       = "ANY"
    v4_cidr_blocks = ["0.0.0.0/0"]
  }
}

resource "yandex_compute_instance" "vm" {
  count = var.create_vm ? 1 : 0

  folder_id                 = var.folder_id
  name                      = var.name
  zone                      = var.zone
  platform_id               = "standard-v3"
  service_account_id        = yandex_iam_service_account.dagster.id
  allow_stopping_for_update = true

  resources {
    cores  = var.vm_cores
    memory = var.vm_memory_gb
  }

  boot_disk {
    auto_delete = !var.deletion_protection

    initialize_params {
      image_id = data.yandex_compute_image.ubuntu[0].id
      type     = "network-ssd"
      size     = var.vm_disk_gb
    }
  }

  network_interface {
    subnet_id          = yandex_vpc_subnet.vm[0].id
    security_group_ids = [yandex_vpc_security_group.vm[0].id]
    nat                = var.vm_public_ip
  }

  metadata = {
    ssh-keys = "ubuntu:${var.vm_ssh_public_key}"
  }

  lifecycle {
    # A newer image is no reason to make the machine, and its databases, anew.
    ignore_changes = [boot_disk[0].initialize_params[0].image_id]

    precondition {
      condition     = var.vm_ssh_public_key != ""
      error_message = "create_vm needs vm_ssh_public_key."
    }
  }
}
