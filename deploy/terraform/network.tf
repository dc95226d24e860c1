resource "yandex_vpc_network" "this" {
  folder_id = var.folder_id
  name      = var.name
}

# The only way out: hosts have no public addresses.
resource "yandex_vpc_gateway" "nat" {
  folder_id = var.folder_id
  name      = "${var.name}-nat"

  shared_egress_gateway {}
}

resource "yandex_vpc_route_table" "nat" {
  folder_id  = var.folder_id
  name       = "${var.name}-nat"
  network_id = yandex_vpc_network.this.id

  static_route {
    destination_prefix = "0.0.0.0/0"
    gateway_id         = yandex_vpc_gateway.nat.id
  }
}

resource "yandex_vpc_subnet" "cluster" {
  folder_id      = var.folder_id
  name           = "${var.name}-cluster"
  zone           = var.zone
  network_id     = yandex_vpc_network.this.id
  route_table_id = yandex_vpc_route_table.nat.id
  v4_cidr_blocks = [cidrsubnet(var.network_cidr, 1, 0)]
}

# What Data Proc requires, or it makes no cluster: everything among the hosts, HTTPS to the cloud's services, and NTP.
# Nothing reaches the hosts from outside.
resource "yandex_vpc_security_group" "cluster" {
  folder_id   = var.folder_id
  name        = "${var.name}-cluster"
  description = "Hosts of the Data Proc clusters."
  network_id  = yandex_vpc_network.this.id

  ingress {
    description       = "From host to host"
    protocol          = "ANY"
    predefined_target = "self_security_group"
  }

  egress {
    description       = "From host to host"
    protocol          = "ANY"
    predefined_target = "self_security_group"
  }

  egress {
    description    = "Object Storage and the API of Data Proc"
    protocol       = "TCP"
    v4_cidr_blocks = ["0.0.0.0/0"]
    port           = 443
  }

  egress {
    description    = "NTP"
    protocol       = "UDP"
    v4_cidr_blocks = ["0.0.0.0/0"]
    port           = 123
  }
}
